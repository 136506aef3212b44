"""A run whose base is in FP8: planned, trained, merged."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from fp8_bases import write_fp8_copy
from safetensors.torch import load_file
from tiny_runs import (
    byte_tokenizer,
    losses_of,
    recipe_values,
    reversal_rows,
    write_base,
    write_recipe,
    write_rows,
)

from qlora_train.cli import main
from qlora_train.export import export


def test_from_plan_to_merged_weights(tmp_path: Path) -> None:
    plain = write_base(tmp_path / "plain")
    base = write_fp8_copy(plain, tmp_path / "base", block=[48, 40])
    rows = write_rows(tmp_path / "rows.jsonl", reversal_rows(20))
    losses = {}
    for folder in (base, tmp_path / "base-16"):
        byte_tokenizer().save_pretrained(folder)
        values = recipe_values(folder, rows, tmp_path / f"run-{folder.name}", training={"max_steps": 6})
        recipe = str(write_recipe(tmp_path / "recipe.yaml", values))
        assert main(["plan", recipe]) == 0 and main(["train", recipe]) == 0
        losses[folder.name] = losses_of(tmp_path / f"run-{folder.name}")
    assert losses["base"] == losses["base-16"]

    for onto in ("original", "dequantized"):
        merged = export(tmp_path / "run-base", base=onto, out=tmp_path / onto)
        tensors = load_file(merged / "model.safetensors")
        assert tensors.keys() == load_file(plain / "model.safetensors").keys()
        assert {tensor.dtype for tensor in tensors.values()} == {torch.float16}
        assert "quantization_config" not in json.loads((merged / "config.json").read_text())
