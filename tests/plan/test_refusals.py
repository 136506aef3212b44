"""What `train` refuses, `plan` refuses in the same words, and never says that it fits."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from tiny_models import tiny_config
from tiny_runs import byte_tokenizer, recipe_values, reversal_rows, write_recipe, write_rows

from qlora_train import cli

ROPE = {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 10000.0}


def base_of(family: str, folder: Path, **changes: Any) -> Path:
    """A folder with a config and a tokenizer; what is refused is refused before weights are looked for."""
    tiny_config(family, vocab_size=259).save_pretrained(folder)
    file = folder / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))
    byte_tokenizer().save_pretrained(folder)
    return folder


@pytest.mark.parametrize(
    ("family", "changes", "data", "message"),
    [
        ("llama", {"quantization_config": {"quant_method": "gptq", "bits": 4}}, {}, "quantized by gptq"),
        ("llama", {"quantization_config": {"quant_method": "awq", "bits": 4}}, {}, "quantized by awq"),
        ("llama", {"quantization_config": {"quant_method": "nvfp4"}}, {}, "quantized by nvfp4"),
        ("llama", {"compression_config": {"quant_method": "compressed-tensors"}}, {}, "compressed-tensors"),
        ("llama4_text", {}, {}, "llama4_text is not supported"),
        ("stablelm", {}, {}, "stablelm is not supported"),
        ("llama", {"rope_parameters": ROPE}, {"sequence_length": 512}, "rope type dynamic"),
        ("llama", {"hidden_size": 10**9}, {}, "hidden_size"),
    ],
    ids=["gptq", "awq", "nvfp4", "compressed", "llama4", "stablelm", "rope", "size"],
)
def test_both_refuse(
    family: str,
    changes: dict[str, Any],
    data: dict[str, Any],
    message: str,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    base = base_of(family, tmp_path / "base", **changes)
    rows = write_rows(tmp_path / "rows.jsonl", reversal_rows(4))
    recipe = write_recipe(tmp_path / "recipe.yaml", recipe_values(base, rows, tmp_path / "run", data=data))
    told = []
    for command in (
        ["plan", str(recipe), "--card", "RTX 4090"],
        ["plan", str(recipe)],
        ["train", str(recipe)],
    ):
        assert cli.main(command) == 2
        output = capsys.readouterr()
        assert "fits" not in output.out
        told.append(output.err)
    assert message in told[0] and told[0] == told[1] == told[2]


def test_a_dtype_that_the_card_has_not_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    base = base_of("llama", tmp_path / "base")
    values = recipe_values(base, tmp_path / "x", tmp_path / "run", model={"compute_dtype": "bfloat16"})
    recipe = write_recipe(tmp_path / "recipe.yaml", values)
    assert cli.main(["plan", str(recipe), "--card", "T4"]) == 2
    assert "no bfloat16 arithmetic" in capsys.readouterr().err


@pytest.mark.parametrize(
    "stored",
    [
        {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "quant_method": "bitsandbytes"},
        {"quant_method": "fp8", "weight_block_size": [128, 128], "fmt": "e4m3"},
        {"quant_method": "fp8", "activation_scheme": "static"},
        {"quant_method": "fbgemm_fp8", "modules_to_not_convert": ["lm_head"]},
    ],
    ids=["bitsandbytes", "blocks", "static", "rows"],
)
def test_what_can_be_read_is_not_refused(
    stored: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    base = base_of("llama", tmp_path / "base", quantization_config=stored)
    values = recipe_values(base, tmp_path / "x", tmp_path / "run")
    recipe = write_recipe(tmp_path / "recipe.yaml", values)
    assert cli.main(["plan", str(recipe), "--card", "RTX 4090"]) == 0
    assert capsys.readouterr().out.startswith("fits")
