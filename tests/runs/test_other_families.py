"""Whole runs of mixtures of experts and of layers with a memory: from disk, resumed, exported, reloaded."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from tiny_models import random_model, tiny_config
from tiny_runs import byte_tokenizer, recipe_values, reversal_rows, write_recipe, write_rows
from transformers import AutoModelForCausalLM

from qlora_train.cli import main

PEFT_LEAVES_OUT = {"deepseek_v3", "qwen3_5_moe_text"}
"""It takes projections of shared experts for the experts', where transformers has renamed those."""
FAMILIES = ["qwen3_moe", "gpt_oss", "deepseek_v3", "qwen3_5_moe_text", "lfm2"]


def write_base_of(folder: Path, family: str) -> Path:
    random_model(tiny_config(family, vocab_size=259)).save_pretrained(folder)
    byte_tokenizer().save_pretrained(folder)
    return folder


def train(root: Path, base: Path, name: str, max_steps: int, *arguments: str) -> Path:
    rows, run = write_rows(root / "rows.jsonl", reversal_rows(24)), root / name
    training = {"max_steps": max_steps, "save_every": 2}
    values = recipe_values(base, rows, run, training=training) | {"memory": {"weights": "disk"}}
    recipe = write_recipe(root / f"{name}-{max_steps}.json", values)
    assert main(["train", str(recipe), *arguments]) == 0
    return run


@pytest.mark.parametrize("family", FAMILIES)
def test_a_run_from_disk_to_a_merged_model(
    tmp_path: Path, family: str, capsys: pytest.CaptureFixture[str]
) -> None:
    base = write_base_of(tmp_path / "base", family)
    straight = train(tmp_path, base, "straight", 4)
    train(tmp_path, base, "stopped", 2)
    stopped = train(tmp_path, base, "stopped", 4, "--resume")
    adapters = [load_file(run / "adapter" / "adapter_model.safetensors") for run in (straight, stopped)]
    assert all(torch.equal(adapters[0][name], adapters[1][name]) for name in adapters[0])

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
