"""A run whose base has its head quantized by bitsandbytes: planned, trained, generated with, merged."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from tiny_models import packed_row, quantize_with_head
from tiny_runs import (
    byte_tokenizer,
    losses_of,
    recipe_values,
    reversal_rows,
    write_base,
    write_recipe,
    write_rows,
)
from transformers import AutoModelForCausalLM

from qlora_train.cli import main
from qlora_train.errors import ExportError
from qlora_train.export import export
from qlora_train.generate.model_folder import find_model
from qlora_train.model.quantized_matrix import QuantizedMatrix
from qlora_train.plan.planned_walk import GenerateSize
from qlora_train.quant.formats import Quantization


@pytest.mark.parametrize(
    "quantization", [Quantization("nf4", double_quant=True), Quantization("int8")], ids=str
)
def test_from_plan_to_merged_weights(
    tmp_path: Path, quantization: Quantization, capsys: pytest.CaptureFixture[str]
) -> None:
    plain = write_base(tmp_path / "plain")
    base = quantize_with_head(plain, tmp_path / "base", quantization)
    byte_tokenizer().save_pretrained(base)
    values = recipe_values(
        base,
        write_rows(tmp_path / "rows.jsonl", reversal_rows(20)),
        tmp_path / "run",
        model={"quantization": quantization.format, "double_quant": True if quantization.is_4bit else None},
        data={"eval": 0.2},
        training={"max_steps": 12, "learning_rate": 2e-2, "eval_every": 6},
    )
    recipe = str(write_recipe(tmp_path / "recipe.yaml", values))
    assert main(["plan", recipe, "--json"]) == 0
    planned = json.loads(capsys.readouterr().out)
    row_bytes = 64 + 4 if quantization.format == "int8" else 64 // 2 + 4
    assert {r["bytes"] for r in planned["rows"] if r["cause"] == "head"} == {259 * row_bytes}
    assert main(["train", recipe]) == 0
    losses = losses_of(tmp_path / "run")
    assert losses[0] > 4 and losses[-1] < 0.8 * losses[0]

    source = find_model(tmp_path / "run")
    decoder = source.load(GenerateSize((8,), 4)).decoder
    assert isinstance(decoder.head, QuantizedMatrix)
    merged = export(tmp_path / "run", base="dequantized")
    tensors = load_file(merged / "model.safetensors")
    original = load_file(plain / "model.safetensors")
    assert {n: t.shape for n, t in tensors.items()} == {n: t.shape for n, t in original.items()}
    assert {t.dtype for t in tensors.values()} == {torch.float16}
    assert torch.equal(tensors["lm_head.weight"], decoder.whole_head().half())
    assert "quantization_config" not in json.loads((merged / "config.json").read_text())

    model = AutoModelForCausalLM.from_pretrained(merged, dtype=torch.float32)
    row = packed_row([20])
    with torch.no_grad():
        x, arguments = decoder.embed_packed(row)
        for i in decoder.layers_in_turn():
            x = decoder.run_layer(i, x, arguments[i])
        assert torch.allclose(decoder.logits(decoder.norm(x)), model(row.token_ids).logits, atol=0.02)
    with pytest.raises(ExportError, match="--base dequantized"):
        export(tmp_path / "run", base="original", out=tmp_path / "original")
