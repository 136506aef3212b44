"""Random packed bases: valid, of an ordinary size, the same every time, and never there in 16 bits."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_models import packed_row

from qlora_train.bench.random_base import make_random_base, write_config
from qlora_train.device.compute import THE_CPU as CPU
from qlora_train.memory.load import load_base
from qlora_train.memory.meter import DeviceMeter
from qlora_train.memory.packed_cache import LAYERS
from qlora_train.model.decoder import FrozenDecoder
from qlora_train.model.loss import TiledLoss
from qlora_train.model.quantize import Packing

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


def made(tmp_path: Path, packing: Packing, dtype: torch.dtype = torch.float32, **changes: Any) -> Path:
    folder = write_config(tmp_path / "base", CONFIG | changes)
    return make_random_base(folder, packing, dtype, tmp_path / "cache")


def loaded(tmp_path: Path, packing: Packing, dtype: torch.dtype = torch.float32) -> FrozenDecoder:
    return load_base(tmp_path / "base", packing, dtype, CPU, cache=tmp_path / "cache")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(
    "packing", [Packing("nf4", True), Packing("fp4", True), Packing("nf4"), Packing("int8"), Packing("none")]
)
def test_weights_and_loss_are_of_an_ordinary_size(
    tmp_path: Path, packing: Packing, dtype: torch.dtype
) -> None:
    made(tmp_path, packing, dtype)
    decoder = loaded(tmp_path, packing, dtype)
    for name, linear in decoder.linears.items():
        weight = linear.source.unpack(name, torch.float32)
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
    made(tmp_path, Packing("nf4", True))
    decoder = loaded(tmp_path, Packing("nf4", True))
    first, second = (
        decoder.weights.packed[f"model.layers.{i}.mlp.up_proj"].unpack(torch.float32)  # type: ignore[attr-defined]
        for i in (0, 1)
    )
    correlation = float((first * second).mean() / (first.std() * second.std()))
    assert abs(correlation) < 0.05
    embedding = decoder.embedding.weight  # type: ignore[attr-defined]
    head = decoder.head.weight  # type: ignore[attr-defined]
    assert len(embedding.unique(dim=0)) == VOCABULARY
    assert not torch.equal(embedding, head)


def test_it_is_the_same_every_time_and_made_once(tmp_path: Path) -> None:
    packing = Packing("nf4", True)
    one, other = made(tmp_path / "a", packing), made(tmp_path / "b", packing)
    assert (one / LAYERS).read_bytes() == (other / LAYERS).read_bytes()
    before = (one / LAYERS).stat().st_mtime_ns
    assert made(tmp_path / "a", packing) == one
    assert (one / LAYERS).stat().st_mtime_ns == before


def test_a_tied_base_has_one_matrix(tmp_path: Path) -> None:
    packing = Packing("nf4", True)
    made(tmp_path, packing, tie_word_embeddings=True)
    decoder = loaded(tmp_path, packing)
    assert decoder.head is decoder.embedding


def test_making_it_takes_two_slabs_and_a_block_of_rows(tmp_path: Path) -> None:
    """And not the weights in 16 bits, which are four slabs a layer."""
    sizes = {"hidden_size": 1024, "intermediate_size": 2816, "num_attention_heads": 16, "vocab_size": 1000}
    with DeviceMeter(CPU) as meter:
        folder = made(tmp_path, Packing("nf4", True), torch.bfloat16, **sizes)
    slab_bytes = (folder / LAYERS).stat().st_size / 3
    block_bytes = 1000 * 1024 * (4 + 2 + 2)  # drawn in fp32, then cast, while the one before is still there
    assert meter.peak_bytes < 2.1 * slab_bytes + block_bytes
