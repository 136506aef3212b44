"""Whole runs of mixtures of experts and of layers with a memory: from disk, resumed, exported, reloaded."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from tiny_models import random_model, tiny_config
from tiny_runs import adapter_bytes, byte_tokenizer, recipe_values, reversal_rows, write_recipe, write_rows
from transformers import AutoModelForCausalLM

from qlora_train.adapter.adapter_config import CONFIG_FILE
from qlora_train.cli import main
from qlora_train.export import export
from qlora_train.generate.decoding import Sampling, generate_tokens
from qlora_train.generate.model_folder import find_model
from qlora_train.plan.planned_walk import GenerateSize

PEFT_LEAVES_OUT = {"deepseek_v3", "qwen3_5_moe_text"}
"""It takes projections of shared experts for the experts', where transformers has renamed those."""
EXPERTS = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]
RUNS = [(family, None) for family in ("qwen3_moe", "gpt_oss", "deepseek_v3", "qwen3_5_moe_text", "lfm2")]
RUNS += [("gemma4_text+experts", None), ("gemma4_text+experts", ["experts.gate_up_proj"])]
RUNS += [("qwen3_moe", EXPERTS), ("gpt_oss", EXPERTS[1:]), ("mixtral", ["layers.1.mlp.experts.gate_up_proj"])]


def write_base_of(folder: Path, family: str) -> Path:
    random_model(tiny_config(family, vocab_size=259)).save_pretrained(folder)
    byte_tokenizer().save_pretrained(folder)
    return folder


def train(
    root: Path, base: Path, name: str, max_steps: int, *arguments: str, experts: list[str] | None = None
) -> Path:
    rows, run = write_rows(root / "rows.jsonl", reversal_rows(24)), root / name
    training = {"max_steps": max_steps, "save_every": 2, "keep_checkpoints": 2}
    values = recipe_values(base, rows, run, training=training, lora={"target_parameters": experts})
    values["memory"] = {"weights": "disk"}
    recipe = write_recipe(root / f"{name}-{max_steps}.json", values)
    assert main(["train", str(recipe), *arguments]) == 0
    return run


@pytest.mark.parametrize(("family", "experts"), RUNS)
def test_a_run_from_disk_to_a_merged_model(
    tmp_path: Path, family: str, experts: list[str] | None, capsys: pytest.CaptureFixture[str]
) -> None:
    base = write_base_of(tmp_path / "base", family)
    straight = train(tmp_path, base, "straight", 4, experts=experts)
    before = adapter_bytes(straight)
    shutil.rmtree(straight / "checkpoints" / "step-4")
    shutil.rmtree(straight / "adapter")
    train(tmp_path, base, "straight", 4, "--resume", experts=experts)  # after step 2
    assert adapter_bytes(straight) == before

    merged = tmp_path / "merged"
    options = ["--base", "dequantized", "--dtype", "float32", "--out", str(merged)]
    assert main(["export", str(straight), "--to", "merged", *options]) == 0
    model, found = AutoModelForCausalLM.from_pretrained(merged, output_loading_info=True)
    assert not found["missing_keys"] and not found["unexpected_keys"]
    assert load_file(merged / "model.safetensors").keys() == load_file(base / "model.safetensors").keys()

    ids = torch.randint(3, 259, (1, 12), generator=torch.Generator().manual_seed(0))
    assert model(ids).logits.isfinite().all()
    onto_original = tmp_path / "original"
    options = ["--base", "original", "--dtype", "float32", "--out", str(onto_original), "--receipt", "none"]
    assert main(["export", str(straight), "--to", "merged", *options]) == 0
    ours = AutoModelForCausalLM.from_pretrained(onto_original)
    if family in PEFT_LEAVES_OUT:
        assert "for experts and leave them out" in capsys.readouterr().out
        return
    theirs = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), straight / "adapter")
    torch.testing.assert_close(ours(ids).logits, theirs(ids).logits, rtol=1e-4, atol=1e-4)


def test_a_run_goes_on_from_an_adapter_with_experts(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Of another run, and of PEFT, which has saved it anew; recipes leave out what is trained."""
    base = write_base_of(tmp_path / "base", "qwen3_moe")
    first = train(tmp_path, base, "first", 2, experts=EXPERTS)
    assert "LoRA rank 4 on 12 of 12 linears; rank 4 on 6 of 6 weights of experts; " in capsys.readouterr().out
    by_peft = tmp_path / "by-peft"
    PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), first / "adapter").save_pretrained(
        by_peft
    )
    wanted = load_file(first / "adapter" / "adapter_model.safetensors")
    for number, adapter in enumerate([first / "adapter", by_peft]):
        options = [f"lora.init_from={adapter}", "training.learning_rate=1e-30"]
        again = train(tmp_path, base, f"again-{number}", 2, *options)
        assert "rank 4 on 6 of 6 weights of experts; " in capsys.readouterr().out
        found = load_file(again / "adapter" / "adapter_model.safetensors")
        assert found.keys() == wanted.keys() and all(torch.equal(found[name], wanted[name]) for name in found)
        config = [json.loads((run / "adapter" / CONFIG_FILE).read_text()) for run in (first, again)]
        assert config[0] == config[1] and config[0]["target_parameters"] == sorted(EXPERTS)


@pytest.mark.parametrize("family", ["mixtral", "gpt_oss"])
def test_a_run_with_experts_writes_what_its_merged_model_writes(tmp_path: Path, family: str) -> None:
    base = write_base_of(tmp_path / "base", family)
    run = train(tmp_path, base, "run", 4, "training.learning_rate=0.05", experts=EXPERTS)
    merged = export(run, base="dequantized", dtype="float32", receipt=None)
    found = []
    for folder in (run, merged, base):
        model = find_model(folder).load(GenerateSize((4, 2), 8))
        found.append(generate_tokens(model.decoder, [[5, 9, 7, 30], [8, 40]], Sampling(8), frozenset()))
    assert found[0] == found[1] != found[2]
