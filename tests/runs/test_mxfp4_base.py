"""A run whose base has experts in MXFP4: planned, trained, measured and merged."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from mxfp4_bases import write_mxfp4_base
from safetensors.torch import load_file
from tiny_runs import byte_tokenizer, losses_of, recipe_values, reversal_rows, write_recipe, write_rows
from transformers import AutoModelForCausalLM

from qlora_train.cli import main
from qlora_train.export import export
from qlora_train.plan.model_shape import find_shape
from qlora_train.quant.formats import MXFP4


def test_from_plan_to_merged_weights(tmp_path: Path) -> None:
    base = write_mxfp4_base(tmp_path / "base", vocab_size=259)
    byte_tokenizer().save_pretrained(base)
    assert {layer.kept for layer in find_shape(str(base)).layers} == {MXFP4}
    values = recipe_values(
        base,
        write_rows(tmp_path / "rows.jsonl", reversal_rows(20)),
        tmp_path / "run",
        data={"eval": 0.2},
        training={"max_steps": 12, "learning_rate": 2e-2},
    )
    recipe = str(write_recipe(tmp_path / "recipe.yaml", values))
    assert main(["plan", recipe]) == 0 and main(["train", recipe]) == 0
    losses = losses_of(tmp_path / "run")
    assert losses[-1] < 0.9 * losses[0]

    numbers = load_file(tmp_path / "base-16" / "model.safetensors")
    for onto in ("original", "dequantized"):
        lines: list[str] = []
        merged = export(tmp_path / "run", base=onto, out=tmp_path / onto, dtype="bfloat16", log=lines.append)
        tensors = load_file(merged / "model.safetensors")
        assert {name: t.shape for name, t in tensors.items()} == {
            name: t.shape for name, t in numbers.items()
        }
        assert {tensor.dtype for tensor in tensors.values()} == {torch.bfloat16}
        experts = [name for name in tensors if name.endswith(("gate_up_proj", "down_proj"))]
        assert len(experts) == 6
        assert all(torch.equal(tensors[name].float(), numbers[name]) for name in experts)
        assert "quantization_config" not in json.loads((merged / "config.json").read_text())
        model, info = AutoModelForCausalLM.from_pretrained(
            merged, dtype=torch.bfloat16, output_loading_info=True
        )
        assert not info["missing_keys"] and not info["unexpected_keys"]
        assert all(torch.equal(value, tensors[name]) for name, value in model.state_dict().items())
