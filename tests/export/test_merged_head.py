"""The output head in a merge: left out where it repeats the embedding, a matrix of its own with factors."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_models import random_model, tiny_config
from transformers import AutoModelForCausalLM

from qlora_train.adapter.adapter_config import AdapterConfig
from qlora_train.adapter.adapter_files import save_adapter
from qlora_train.errors import BaseModelError
from qlora_train.export.merge import merge


@pytest.mark.parametrize("family", ["llama-tied", "llama"])
def test_a_head_with_factors_is_untied(tmp_path: Path, family: str) -> None:
    """And the embedding is not touched, as plain transformers loads it."""
    model = random_model(tiny_config(family))
    model.save_pretrained(tmp_path / "base")
    generator = torch.Generator().manual_seed(3)
    lora = {
        name: (torch.randn(4, 64, generator=generator), torch.randn(rows, 4, generator=generator) * 0.1)
        for name, rows in (("lm_head", 96), ("model.layers.1.self_attn.q_proj", 64))
    }
    config = AdapterConfig("base", 4, 8, target_modules=sorted(lora), alpha_pattern={"lm_head": 2})
    save_adapter(tmp_path / "adapter", config, lora)
    merge(tmp_path / "base", tmp_path / "adapter", tmp_path / "out", quantization=None, dtype=torch.float32)
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "out").eval()
    assert merged.config.tie_word_embeddings is False
    assert torch.equal(merged.model.embed_tokens.weight, model.model.embed_tokens.weight)
    b_a = lora["lm_head"][1] @ lora["lm_head"][0]
    torch.testing.assert_close(
        merged.lm_head.weight.data, model.get_output_embeddings().weight.data + 0.5 * b_a
    )


@pytest.mark.parametrize(
    "tied,change,is_written", [(True, 0.0, False), (True, 1.0, None), (False, 0.0, True), (True, None, None)]
)
def test_a_head_that_repeats_the_tied_embedding_is_left_out(
    tmp_path: Path, tied: bool, change: float | None, is_written: bool | None
) -> None:
    random_model(tiny_config("llama", tie_word_embeddings=tied)).save_pretrained(tmp_path / "base")
    lora = {"model.layers.0.self_attn.q_proj": (torch.ones(4, 64), torch.ones(64, 4))}
    save_adapter(tmp_path / "adapter", AdapterConfig("base", 4, 8), lora)
    tensors = load_file(tmp_path / "base" / "model.safetensors")
    head = tensors["model.embed_tokens.weight"].clone()
    head[39, 63] += change or 0.0
    tensors["lm_head.weight"] = head if change is not None else head.half()
    save_file(tensors, tmp_path / "base" / "model.safetensors")
    folders = (tmp_path / "base", tmp_path / "adapter", tmp_path / "out")
    if is_written is None:  # another head than the embedding, which training refuses too
        with pytest.raises(BaseModelError, match="tie_word_embeddings"):
            merge(*folders, quantization=None, dtype=torch.float16)
        return
    merge(*folders, quantization=None, dtype=torch.float16)
    written = load_file(tmp_path / "out" / "model.safetensors")
    assert ("lm_head.weight" in written) is is_written
