"""An adapter with factors on the output head: merged, the head is a matrix of its own."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from tiny_models import random_model, tiny_config
from transformers import AutoModelForCausalLM

from qlora_train.export import merge
from qlora_train.model.adapter_config import AdapterConfig
from qlora_train.model.adapter_files import save_adapter


@pytest.mark.parametrize("family", ["llama-tied", "llama"])
def test_a_head_with_factors_is_untied(tmp_path: Path, family: str) -> None:
    """And the embedding is not touched, as plain transformers loads it."""
    model = random_model(tiny_config(family))
    model.save_pretrained(tmp_path / "base")
    generator = torch.Generator().manual_seed(3)
    factors = {
        name: (torch.randn(4, 64, generator=generator), torch.randn(rows, 4, generator=generator) * 0.1)
        for name, rows in (("lm_head", 96), ("model.layers.1.self_attn.q_proj", 64))
    }
    config = AdapterConfig("base", 4, 8, target_modules=sorted(factors), alpha_pattern={"lm_head": 2})
    save_adapter(tmp_path / "adapter", config, factors)
    merge(tmp_path / "base", tmp_path / "adapter", tmp_path / "out", packing=None, dtype=torch.float32)
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "out").eval()
    assert merged.config.tie_word_embeddings is False
    assert torch.equal(merged.model.embed_tokens.weight, model.model.embed_tokens.weight)
    b_a = factors["lm_head"][1] @ factors["lm_head"][0]
    torch.testing.assert_close(
        merged.lm_head.weight.data, model.get_output_embeddings().weight.data + 0.5 * b_a
    )
