"""Random quantized bases: valid, of an ordinary size, the same every time, and never there in 16 bits."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from benchmarks.random_base import make_random_base, write_config
from tiny_models import packed_row

from qlora_train.device.compute import THE_CPU as CPU
from qlora_train.device.memory_tracker import MemoryTracker
from qlora_train.model.decoder import FrozenDecoder
from qlora_train.model.loss import TiledLoss
from qlora_train.quant.formats import Quantization
from qlora_train.weights.load import load_base
from qlora_train.weights.quantized_cache import LAYERS_FILE

VOCABULARY = 401
CONFIG = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_size": 96,
    "intermediate_size": 200,
    "num_hidden_layers": 3,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "vocab_size": VOCABULARY,
    "max_position_embeddings": 128,
    "tie_word_embeddings": False,
    "rms_norm_eps": 1e-5,
}


def made(
    tmp_path: Path, quantization: Quantization, dtype: torch.dtype = torch.float32, **changes: Any
) -> Path:
    folder = write_config(tmp_path / "base", CONFIG | changes)
    return make_random_base(folder, quantization, dtype, tmp_path / "cache")


def loaded(tmp_path: Path, quantization: Quantization, dtype: torch.dtype = torch.float32) -> FrozenDecoder:
    return load_base(tmp_path / "base", quantization, dtype, CPU, cache=tmp_path / "cache")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(
    "quantization",
    [
        Quantization("nf4", True),
        Quantization("fp4", True),
        Quantization("nf4"),
        Quantization("int8"),
        Quantization("none"),
    ],
)
def test_weights_and_loss_are_of_an_ordinary_size(
    tmp_path: Path, quantization: Quantization, dtype: torch.dtype
) -> None:
    made(tmp_path, quantization, dtype)
    decoder = loaded(tmp_path, quantization, dtype)
    for name, linear in decoder.linears.items():
        weight = linear.source.dequantize(name, torch.float32)
        assert torch.isfinite(weight).all()
        assert 0.9 < weight.square().mean().sqrt() * math.sqrt(linear.in_features) < 1.1, name
    tokens = packed_row([40, 23])
    with torch.no_grad():
        x, arguments = decoder.embed_packed(tokens)
        for i in decoder.layers_in_turn():
            x = decoder.run_layer(i, x, arguments[i])
        loss_sum, _ = TiledLoss(decoder, 16)([x], [tokens], None)
    assert abs(float(loss_sum) / len(tokens.supervised) - math.log(VOCABULARY) - 0.5) < 0.7


def test_layers_and_rows_differ(tmp_path: Path) -> None:
    made(tmp_path, Quantization("nf4", True))
    decoder = loaded(tmp_path, Quantization("nf4", True))
    first, second = (
        decoder.weights.quantized[f"model.layers.{i}.mlp.up_proj"].dequantize(torch.float32)  # type: ignore[attr-defined]
        for i in (0, 1)
    )
    correlation = float((first * second).mean() / (first.std() * second.std()))
    assert abs(correlation) < 0.05
    embedding = decoder.embedding.weight  # type: ignore[attr-defined]
    head = decoder.head.weight  # type: ignore[attr-defined]
    assert len(embedding.unique(dim=0)) == VOCABULARY
    assert not torch.equal(embedding, head)


def test_it_is_the_same_every_time_and_made_once(tmp_path: Path) -> None:
    quantization = Quantization("nf4", True)
    one, other = made(tmp_path / "a", quantization), made(tmp_path / "b", quantization)
    assert (one / LAYERS_FILE).read_bytes() == (other / LAYERS_FILE).read_bytes()
    before = (one / LAYERS_FILE).stat().st_mtime_ns
    assert made(tmp_path / "a", quantization) == one
    assert (one / LAYERS_FILE).stat().st_mtime_ns == before


def test_a_tied_base_has_one_matrix(tmp_path: Path) -> None:
    quantization = Quantization("nf4", True)
    made(tmp_path, quantization, tie_word_embeddings=True)
    decoder = loaded(tmp_path, quantization)
    assert decoder.head is decoder.embedding


def test_making_it_takes_two_slabs_and_a_block_of_rows(tmp_path: Path) -> None:
    """And not the weights in 16 bits, which are four slabs a layer."""
    sizes = {"hidden_size": 1024, "intermediate_size": 2816, "num_attention_heads": 16, "vocab_size": 1000}
    with MemoryTracker(CPU) as meter:
        folder = made(tmp_path, Quantization("nf4", True), torch.bfloat16, **sizes)
    layer_buffer_bytes = (folder / LAYERS_FILE).stat().st_size / 3
    block_bytes = 1000 * 1024 * (4 + 2 + 2)  # drawn in fp32, then cast, while the one before is still there
    assert meter.peak_bytes < 2.1 * layer_buffer_bytes + block_bytes
