"""Checkpoints of several parts, of which one is a language model: it trains, and the rest stays as it is."""

from __future__ import annotations

import json
import re
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from peft import AutoPeftModel, PeftModel
from safetensors.torch import load_file, save_file
from tiny_models import OTHER_FAMILIES, packed_row
from tiny_runs import adapter_bytes, byte_tokenizer, recipe_values, reversal_rows, write_recipe, write_rows
from torch import Tensor
from transformers import AutoModelForImageTextToText

from qlora_train.cli import main
from qlora_train.generate import generate
from qlora_train.model.base import read_config

TEXT: dict[str, Any] = {
    "vocab_size": 259, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 256, "head_dim": 16,
    "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
VISION: dict[str, Any] = {"hidden_size": 32, "intermediate_size": 48}
DELTA = {k: v for k, v in OTHER_FAMILIES["qwen3_5_text"].items() if k.startswith("linear_")}
WRAPPED: dict[str, Any] = {
    "qwen3_5": lambda: transformers.Qwen3_5Config(
        text_config=TEXT | DELTA | {"layer_types": ["linear_attention", "full_attention"]},
        vision_config=VISION | {"depth": 1, "num_heads": 2, "out_hidden_size": 64},
        image_token_id=250, video_token_id=251, vision_start_token_id=252, vision_end_token_id=253,
        tie_word_embeddings=False,
    ),
    "gemma3": lambda: transformers.Gemma3Config(
        text_config=TEXT | {"layer_types": ["sliding_attention", "full_attention"]},
        vision_config=VISION
        | {"num_hidden_layers": 1, "num_attention_heads": 2, "image_size": 28, "patch_size": 14},
        mm_tokens_per_image=4, image_token_index=250, boi_token_index=251, eoi_token_index=252,
    ),
    "mistral3": lambda: transformers.Mistral3Config(
        text_config=TEXT | {"model_type": "mistral"},
        vision_config=VISION | {"model_type": "pixtral", "num_hidden_layers": 1, "num_attention_heads": 2,
                                "image_size": 28, "patch_size": 14, "head_dim": 16},
        image_token_index=250,
    ),
}  # fmt: skip


def write_wrapped(folder: Path, name: str) -> Path:
    """A checkpoint with random weights, bf16 in its vision part, and a head that predicts further tokens."""
    torch.manual_seed(0)
    model = AutoModelForImageTextToText.from_config(WRAPPED[name]())
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(1.0 if parameter.dim() == 1 else 0.0, 0.08)
    model.save_pretrained(folder)
    byte_tokenizer().save_pretrained(folder)
    file = folder / "model.safetensors"
    tensors = {n: t if "language_model" in n else t.bfloat16() for n, t in load_file(file).items()}
    tensors |= {n: t.float() for n, t in tensors.items() if "lm_head" in n}
    if name == "qwen3_5":
        tensors["mtp.layers.0.mlp.up_proj.weight"] = torch.randn(3, 5, dtype=torch.bfloat16)
    save_file(tensors, file, {"format": "pt"})
    return folder


def is_trained(name: str) -> bool:
    """All linears of the text part."""
    return "language_model" in name and re.search(r"_proj\w*\.weight$", name) is not None


def peft_logits(base: Path, adapter: Path) -> Tensor:
    """Of the class that is served, with an adapter that PEFT loads without a word about its names."""
    model = AutoModelForImageTextToText.from_pretrained(base, dtype=torch.float32)
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)  # keys that are missing
        adapted = PeftModel.from_pretrained(model, adapter)
    return adapted(input_ids=packed_row([9]).token_ids).logits


def with_names_of_the_text_model(adapter: Path) -> None:
    """As runs wrote adapters before."""
    tensors = load_file(adapter / "adapter_model.safetensors")
    assert all(".language_model.layers." in name for name in tensors)
    renamed = {name.replace(".language_model.", "."): tensor for name, tensor in tensors.items()}
    save_file(renamed, adapter / "adapter_model.safetensors", {"format": "pt"})
    text = (adapter / "adapter_config.json").read_text().replace(r"language_model\\.", "")
    config = json.loads(text) | {"target_modules": sorted({name.split(".")[-3] for name in tensors})}
    (adapter / "adapter_config.json").write_text(json.dumps(config))


@pytest.mark.parametrize("name", WRAPPED)
def test_the_text_part_trains_and_the_rest_stays_byte_for_byte(tmp_path: Path, name: str) -> None:
    base = write_wrapped(tmp_path / "base", name)
    assert read_config(base).model_type != name or name == "mistral3"
    rows, run, out = (
        write_rows(tmp_path / "rows.jsonl", reversal_rows(20)),
        tmp_path / "run",
        tmp_path / "out",
    )
    values = recipe_values(base, rows, run, model={"quantization": "none"}, training={"max_steps": 3})
    assert main(["train", str(write_recipe(tmp_path / "recipe.json", values))]) == 0
    assert main(["export", str(run), "--to", "merged", "--out", str(out), "--dtype", "float32"]) == 0
    before, after = load_file(base / "model.safetensors"), load_file(out / "model.safetensors")
    assert before.keys() == after.keys()
    for tensor in before:
        same = before[tensor].dtype == after[tensor].dtype and torch.equal(before[tensor], after[tensor])
        assert same != is_trained(tensor), tensor
    model, found = AutoModelForImageTextToText.from_pretrained(out, output_loading_info=True)
    assert not found["missing_keys"] and not {n for n in found["unexpected_keys"] if not n.startswith("mtp.")}
    assert model(input_ids=packed_row([9]).token_ids).logits.isfinite().all()
    torch.testing.assert_close(
        peft_logits(base, run / "adapter"),
        model.float()(input_ids=packed_row([9]).token_ids).logits,
        rtol=1e-4,
        atol=1e-4,
    )


def test_adapters_name_modules_as_the_served_class_does_and_older_ones_load(tmp_path: Path) -> None:
    base, rows = (
        write_wrapped(tmp_path / "base", "gemma3"),
        write_rows(tmp_path / "r.jsonl", reversal_rows(20)),
    )
    some_layers = {"target_modules": ["q_proj", "down_proj"], "rank_pattern": {"layers.0.mlp.down_proj": 2}}

    def train(run: str, *more: str, **lora: Any) -> Path:
        values = recipe_values(
            base, rows, tmp_path / run, model={"quantization": "nf4"}, training={"max_steps": 2}, lora=lora
        )
        assert main(["train", str(write_recipe(tmp_path / f"{run}.json", values)), *more]) == 0
        return tmp_path / run

    run = train("run", **some_layers)
    adapted = AutoPeftModel.from_pretrained(run / "adapter")
    assert type(adapted.get_base_model()).__name__ == "Gemma3ForConditionalGeneration"
    assert "vision" not in " ".join(name for name, _ in adapted.named_modules() if "lora_A" in name)
    served = merged(run, tmp_path / "served")
    continued = adapter_bytes(train("continued", init_from=str(run / "adapter")))
    answers = generate(run, ["abc:"], max_new_tokens=4)
    with_names_of_the_text_model(run / "adapter")
    assert merged(run, tmp_path / "text") == served
    assert adapter_bytes(train("again", init_from=str(run / "adapter"))) == continued
    assert generate(run, ["abc:"], max_new_tokens=4) == answers
    assert main(["train", str(run), "--resume", "training.max_steps=3"]) == 0
    assert b"language_model" in adapter_bytes(run)


def merged(run: Path, out: Path) -> bytes:
    assert main(["export", str(run), "--to", "merged", "--out", str(out), "--dtype", "float32"]) == 0
    return (out / "model.safetensors").read_bytes()
