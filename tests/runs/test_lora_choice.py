"""A run with chosen linears and a mix of ranks: what it says, what PEFT loads, and how it goes on."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from tiny_models import packed_row
from tiny_runs import recipe_values, write_recipe
from transformers import AutoModelForCausalLM

from qlora_train.adapter.adapter_config import CONFIG_FILE
from qlora_train.adapter.adapter_files import WEIGHTS_FILE, load_fitting
from qlora_train.cli import main
from qlora_train.device.compute import THE_CPU
from qlora_train.export import export
from qlora_train.generate.decoding import generate_tokens
from qlora_train.generate.model_folder import find_model
from qlora_train.generate.sampling import Sampling
from qlora_train.model.lora_parameters import LoraParameters
from qlora_train.plan.planned_walk import GenerateSize
from qlora_train.quant.formats import Quantization
from qlora_train.recipe import load_recipe
from qlora_train.train import train
from qlora_train.weights.load import load_base

MIXES: dict[str, dict[str, Any]] = {
    "expression": {
        "target_modules": r".*_proj",
        "exclude_modules": r".*layers\.1\.mlp\..*|.*o_proj",
        "rank_pattern": {r"layers\.0\..*(k|v)_proj": 2, "up_proj": 6},
        "alpha_pattern": {"v_proj": 3, "q_proj": 16},
    },
    "layers, rank stabilized": {
        "layers_to_transform": [1],
        "rank_pattern": {"down_proj": 3},
        "use_rslora": True,
    },
    "DoRA": {"target_modules": ["q_proj", "k_proj", "v_proj", "down_proj"], "use_dora": True},
    "biases": {"exclude_modules": ["o_proj"], "lora_bias": True},
}
COVERAGE = {
    "expression": "LoRA on 9 of 14 linears: rank 2 on 2, rank 4 on 6, rank 6 on 1",
    "layers, rank stabilized": "LoRA on 7 of 14 linears: rank 3 on 1, rank 4 on 6",
    "DoRA": "LoRA rank 4 on 8 of 14 linears",
    "biases": "LoRA rank 4 on 12 of 14 linears",
}


def mixed_recipe(base: Path, train_file: Path, folder: Path, keys: dict[str, Any]) -> Path:
    values = recipe_values(
        base, train_file, folder / "run", lora=keys, model={"quantization": "none"}, training={"max_steps": 3}
    )
    return write_recipe(folder / "recipe.yaml", values)


@pytest.mark.parametrize("name", MIXES)
def test_peft_loads_what_was_trained_and_a_run_goes_on_from_it(
    tmp_path: Path, base: Path, train_file: Path, name: str, capsys: pytest.CaptureFixture[str]
) -> None:
    recipe = mixed_recipe(base, train_file, tmp_path, MIXES[name])
    assert main(["plan", str(recipe)]) == 0
    assert COVERAGE[name] in capsys.readouterr().out.splitlines()
    assert main(["train", str(recipe)]) == 0
    assert f"\n{COVERAGE[name]}; " in capsys.readouterr().out
    adapter = tmp_path / "run" / "adapter"

    decoder = load_base(base, Quantization("none"), torch.float32, THE_CPU)
    config, pairs = load_fitting(adapter, decoder.linears)
    assert all(b.count_nonzero() for _, b, *_ in pairs.values())
    LoraParameters.of_adapter(decoder.linears, config, pairs, dtype=torch.float32, device="cpu")
    tokens = packed_row([23])
    with torch.no_grad():
        x, arguments = decoder.embed_packed(tokens)
        for index in range(2):
            x = decoder.run_layer(index, x, arguments[index])
        ours = decoder.logits(decoder.norm(x))
        plain = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
        before = plain(tokens.token_ids).logits
        wrapped = PeftModel.from_pretrained(plain, adapter).eval()
        theirs = wrapped(tokens.token_ids).logits
    wrapped.save_pretrained(tmp_path / "by-peft")
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)
    assert not torch.allclose(before, theirs, atol=1e-3)

    for number, (left_out, folder) in enumerate([(True, adapter), (False, tmp_path / "by-peft")]):
        continued = [f"lora.init_from={folder}", "training.learning_rate=1e-30"]
        values = json.loads(recipe.read_text())
        if left_out:
            del values["lora"]
        write_recipe(tmp_path / "next.yaml", values)
        output = f"training.output_dir={tmp_path / f'next-{number}'}"
        assert main(["plan", str(tmp_path / "next.yaml"), *continued, output]) == 0
        assert COVERAGE[name] in capsys.readouterr().out.splitlines()
        assert main(["train", str(tmp_path / "next.yaml"), *continued, output]) == 0
        again = tmp_path / f"next-{number}" / "adapter"
        assert (again / CONFIG_FILE).read_text() == (adapter / CONFIG_FILE).read_text()
        before_it, after_it = load_file(adapter / WEIGHTS_FILE), load_file(again / WEIGHTS_FILE)
        assert before_it.keys() == after_it.keys()
        assert all(torch.equal(before_it[key], after_it[key]) for key in before_it)


def test_what_dora_has_trained_is_generated_and_merged(tmp_path: Path, base: Path, train_file: Path) -> None:
    """The run's own model and the merged one write the same tokens, which the base does not."""
    keys = {"training.learning_rate": "0.05", "model.quantization": "nf4", "lora.use_dora": "true"}
    recipe = mixed_recipe(base, train_file, tmp_path, {})
    train(load_recipe(recipe, [f"{key}={value}" for key, value in keys.items()]))
    merged = export(tmp_path / "run", base="dequantized", dtype="float32", receipt=None)
    found = []
    for folder in (tmp_path / "run", merged, base):
        model = find_model(folder).load(GenerateSize((4, 2), 8))
        found.append(generate_tokens(model.decoder, [[5, 9, 7, 30], [8, 40]], Sampling(8), frozenset()))
    assert found[0] == found[1] != found[2]


def test_resume_refuses_another_choice_and_takes_the_same(
    tmp_path: Path, base: Path, train_file: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    recipe = mixed_recipe(base, train_file, tmp_path, MIXES["expression"])
    train(load_recipe(recipe))
    longer = [str(recipe), "--resume", "training.max_steps=4"]
    for key, value in {
        "target_modules": "all-linear",
        "exclude_modules": "null",
        "rank_pattern": "{up_proj: 6}",
        "alpha_pattern": "{q_proj: 16, v_proj: 3}",  # another order: the first that matches decides
    }.items():
        assert main(["train", *longer, f"lora.{key}={value}"]) == 2
        assert re.search(rf"these keys differ: lora\.{key}\. ", capsys.readouterr().err)
    assert main(["train", *longer]) == 0
    assert main(["train", str(tmp_path / "run"), "--resume", "training.max_steps=5"]) == 0


def test_a_name_of_experts_or_of_nothing_stops_plan_and_train(
    tmp_path: Path, base: Path, train_file: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    recipe = str(mixed_recipe(base, train_file, tmp_path, {"rank_pattern": {"query": 8}}))
    for command in ("plan", "train"):
        assert main([command, recipe]) == 2
        message = capsys.readouterr().err
        assert (
            "lora.rank_pattern: query matches no linear layer that is trained; there are mlp.down" in message
        )
    assert not (tmp_path / "run").exists()
