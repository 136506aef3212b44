"""Runs that begin with the principal parts of the weights: what they write is for the original base."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from tiny_models import NF4, packed_row, quantize_with_head
from tiny_runs import adapter_bytes, adapter_tensors, losses_of, recipe_values, write_recipe
from torch import Tensor
from transformers import AutoModelForCausalLM

from qlora_train.cli import main
from qlora_train.errors import RunFolderError
from qlora_train.export import export
from qlora_train.export.receipt import RECEIPT_FILE
from qlora_train.generate.decoding import generate_tokens
from qlora_train.generate.model_folder import find_model
from qlora_train.generate.sampling import Sampling
from qlora_train.plan.planned_walk import GenerateSize
from qlora_train.recipe import Recipe
from qlora_train.train import train
from qlora_train.weights.cache_key import cache_root

EXACT = {"init_lora_weights": "pissa"}
MIXED = {
    "init_lora_weights": "pissa_niter_4",
    "rank_pattern": {"down_proj": 2},
    "alpha_pattern": {"q_proj": 5},
    "exclude_modules": ["o_proj"],
}


SECTIONS: dict[str, dict[str, Any]] = {
    "lora": EXACT,
    "training": {"max_steps": 3, "learning_rate": 0.01},
    "data": {"eval": 0.2},
}


def trained(base: Path, rows: Path, run: Path, *, use_cache: bool = True, **keys: dict[str, Any]) -> Path:
    values = recipe_values(base, rows, run, **(SECTIONS | keys))
    train(Recipe.from_dict(values), use_cache=use_cache)
    return run


def logits(model: Any) -> Tensor:
    with torch.no_grad():
        return model(packed_row([23]).token_ids).logits


@pytest.mark.parametrize("keys", [EXACT, MIXED, EXACT | {"use_rslora": True}])
def test_peft_loads_on_the_original_base_what_is_merged_onto_it(
    tmp_path: Path, base: Path, train_file: Path, keys: dict[str, Any]
) -> None:
    run = trained(base, train_file, tmp_path / "run", lora=keys, model={"quantization": "none"})
    plain = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    before = logits(plain)
    theirs = logits(PeftModel.from_pretrained(plain, run / "adapter"))
    merged = export(run, dtype="float32")
    ours = logits(AutoModelForCausalLM.from_pretrained(merged, dtype=torch.float32))
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)
    assert not torch.allclose(before, theirs, atol=1e-2)
    figures = json.loads((merged / RECEIPT_FILE).read_text())["figures"]
    assert abs(figures[0]["loss_difference"]) < 1e-4  # as it was trained, on the residual


def test_it_begins_as_the_base_does(tmp_path: Path, base: Path, train_file: Path) -> None:
    losses = []
    for name, init in (("usual", True), ("exact", "pissa"), ("fast", "pissa_niter_2")):
        keys: dict[str, Any] = {"lora": {"init_lora_weights": init}, "model": {"quantization": "none"}}
        losses.append(losses_of(trained(base, train_file, tmp_path / name, **keys)))
    assert losses[1][0] == pytest.approx(losses[0][0], abs=1e-5)
    assert losses[2][0] == pytest.approx(losses[0][0], abs=1e-5)
    assert losses[1][-1] != pytest.approx(losses[0][-1], abs=1e-4)  # but goes another way


def test_streamed_without_a_cache_and_after_the_cache_was_lost(
    tmp_path: Path, base: Path, train_file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The same bytes wherever the base waits; a resume that has to decompose again goes on as before."""
    monkeypatch.setenv("QLORA_TRAIN_CACHE", str(tmp_path / "cache"))
    straight = adapter_bytes(trained(base, train_file, tmp_path / "straight"))
    assert len(list(cache_root().glob("base-nf4-*/factors.safetensors"))) == 1
    for place in ("ram", "disk"):
        keys = recipe_values(base, train_file, tmp_path / place, **SECTIONS) | {"memory": {"weights": place}}
        train(Recipe.from_dict(keys))
        assert adapter_bytes(tmp_path / place) == straight
    assert adapter_bytes(trained(base, train_file, tmp_path / "uncached", use_cache=False)) == straight

    shorter = {"max_steps": 3, "learning_rate": 0.01, "lr_schedule": "constant"}
    longer = adapter_bytes(
        trained(base, train_file, tmp_path / "longer", training=shorter | {"max_steps": 5})
    )
    run = trained(base, train_file, tmp_path / "run", training=shorter)
    monkeypatch.setenv("QLORA_TRAIN_CACHE", str(tmp_path / "another"))
    assert main(["train", str(run), "--resume", "training.max_steps=5"]) == 0
    assert adapter_bytes(run) == longer


@pytest.mark.parametrize("cache", ["kept", "lost"])
def test_the_trained_model_generates_and_merges_as_it_was_trained(
    tmp_path: Path, base: Path, train_file: Path, monkeypatch: pytest.MonkeyPatch, cache: str
) -> None:
    fast = {"max_steps": 3, "learning_rate": 0.05}
    run = trained(base, train_file, tmp_path / "run", lora=MIXED, training=fast)
    if cache == "lost":
        monkeypatch.setenv("QLORA_TRAIN_CACHE", str(tmp_path / "another"))
    merged = export(run, base="dequantized", dtype="float32")
    assert json.loads((merged / RECEIPT_FILE).read_text())["figures"][0]["kl"] < 1e-6
    found = []
    for folder in (run, merged, base):
        model = replace(find_model(folder), dtype=torch.float32).load(GenerateSize((4, 2), 8))
        found.append(generate_tokens(model.decoder, [[5, 9, 7, 30], [8, 40]], Sampling(8), frozenset()))
    assert found[0] == found[1] != found[2]


def test_the_base_beside_it_and_adapters_that_are_switched(
    tmp_path: Path, base: Path, train_file: Path
) -> None:
    """With its principal parts back, the residual is the base; an adapter of another base is refused."""
    without = {"model": {"quantization": "none"}, "training": {"max_steps": 2}}
    run = trained(base, train_file, tmp_path / "run", **without)
    source = find_model(run)
    tokens, size = [[5, 9, 7, 30], [8, 40]], GenerateSize((4, 2), 8)
    answers = []
    for place in (source, find_model(base)):
        model = replace(place, dtype=torch.float32).load(size)
        source.attach(model.decoder, None)
        answers.append(generate_tokens(model.decoder, tokens, Sampling(8), frozenset()))
    assert answers[0] == answers[1]
    usual = trained(base, train_file, tmp_path / "usual", lora={}, **without)
    source.with_adapters({"again": run}, print)
    for one, other in ((run, usual), (usual, run)):
        with pytest.raises(RunFolderError, match=r"one was trained with PiSSA .* their bases differ"):
            find_model(one).with_adapters({"other": other}, print)


def test_another_run_goes_on_from_it_as_from_any_adapter(
    tmp_path: Path, base: Path, train_file: Path
) -> None:
    run = trained(base, train_file, tmp_path / "run", lora=MIXED)
    keys = {"lora": {"init_from": str(run / "adapter"), "init_lora_weights": True}}
    values = recipe_values(base, train_file, tmp_path / "next", training={"learning_rate": 1e-30}, **keys)
    del values["lora"]["rank"], values["lora"]["alpha"]
    train(Recipe.from_dict(values))
    before, after = adapter_tensors(run), adapter_tensors(tmp_path / "next")
    assert before.keys() == after.keys() and all(torch.equal(before[name], after[name]) for name in before)


def test_what_it_does_not_go_with_is_refused_by_name(
    tmp_path: Path, base: Path, train_file: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    quantized = quantize_with_head(base, tmp_path / "quantized", NF4)
    for file in base.glob("tokenizer*"):
        (quantized / file.name).write_bytes(file.read_bytes())
    recipe = recipe_values(base, train_file, tmp_path / "run", lora={"init_lora_weights": "pissa"})
    write_recipe(tmp_path / "recipe.json", recipe)
    for key, words in {
        "lora.use_dora=true": "init_lora_weights.* must be true with use_dora",
        "lora.lora_bias=true": "init_lora_weights.* must be true with lora_bias",
        "lora.init_from=adapter": "init_lora_weights.* must be true with init_from",
        "lora.init_lora_weights=olora": "must be true .* pissa, or pissa_niter_16",
        f"model.base={quantized}": "already quantized by bitsandbytes.*init_lora_weights: pissa",
        "lora.rank=100": "fewer than its LoRA rank 100",
    }.items():
        for command in ("plan", "train"):
            assert main([command, str(tmp_path / "recipe.json"), key]) == 2
            error = " ".join(capsys.readouterr().err.split())
            assert re.search(words, error), error
    assert not (tmp_path / "run").exists()


def test_the_plan_says_what_it_takes(
    tmp_path: Path,
    base: Path,
    train_file: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setenv("QLORA_TRAIN_CACHE", str(tmp_path / "cache"))

    def planned(*keys: str) -> tuple[dict[tuple[str, str], int], str]:
        recipe = write_recipe(tmp_path / "recipe.json", recipe_values(base, train_file, tmp_path / "run"))
        assert main(["plan", str(recipe), "--json", *keys]) == 0
        plan = json.loads(capsys.readouterr().out)
        return {(row["place"], row["cause"]): row["bytes"] for row in plan["rows"]}, " ".join(plan["remarks"])

    usual, _ = planned()
    pissa, remarks = planned("lora.init_lora_weights=pissa_niter_1")
    assert "PiSSA: decomposing 14 weights takes about" in remarks
    adapter = usual["disk", "adapter"]
    assert pissa["disk", "adapter"] == 2 * adapter
    made = "disk", "quantized base (cache)"
    assert pissa[made] - usual[made] == adapter
