"""Who may share a batch where the rotary table depends on the longest sequence."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from tiny_models import random_model, tiny_config

from qlora_train.device.compute import THE_CPU
from qlora_train.errors import UnsupportedModelError
from qlora_train.generate.decoding import generate_tokens
from qlora_train.generate.sampling import Sampling
from qlora_train.model.rope_lengths import batches_by_table
from qlora_train.quant.formats import Quantization
from qlora_train.weights.load import load_base

LONGROPE = {
    "rope_type": "longrope",
    "rope_theta": 10000.0,
    "short_factor": [1.0] * 8,
    "long_factor": [3.0 + i for i in range(8)],
    "original_max_position_embeddings": 16,
}


def phi3() -> object:
    sizes = {"max_position_embeddings": 64, "original_max_position_embeddings": 16}
    return tiny_config("phi3", rope_parameters=LONGROPE, **sizes)


def test_batches() -> None:
    assert batches_by_table(tiny_config("llama"), [5, 500], 10) == [[0, 1]]
    assert batches_by_table(phi3(), [20, 4, 30, 5], 8) == [[1, 3], [0, 2]]
    assert batches_by_table(phi3(), [3], 13) == [[0]]
    with pytest.raises(UnsupportedModelError, match="Ask for 2 new tokens or less"):
        batches_by_table(phi3(), [20, 14], 3)
    dynamic = {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 10000.0}
    config = tiny_config("llama", rope_parameters=dynamic, max_position_embeddings=16)
    assert batches_by_table(config, [4, 8], 8) == [[0, 1]]
    with pytest.raises(UnsupportedModelError, match="a prompt of 20 tokens.*Shorten the prompt"):
        batches_by_table(config, [20], 1)


def test_each_prompt_is_answered_as_alone(tmp_path: Path) -> None:
    """By the library too, whose table follows the longest sequence of a call."""
    model = random_model(phi3())
    model.save_pretrained(tmp_path)
    decoder = load_base(tmp_path, Quantization("none"), torch.float32, THE_CPU)
    prompts = [list(range(5, 27)), [7, 9, 8], list(range(30, 49))]
    together = generate_tokens(decoder, prompts, Sampling(6), frozenset())
    for prompt, answer in zip(prompts, together, strict=True):
        assert generate_tokens(decoder, [prompt], Sampling(6), frozenset()) == [answer]
        expected = model.generate(
            torch.tensor([prompt]), max_new_tokens=6, do_sample=False, eos_token_id=None, pad_token_id=0
        )
        assert expected[0, len(prompt) :].tolist() == answer
