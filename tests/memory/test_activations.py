"""How much a kept layer costs, measured, and which layers are kept."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from tiny_models import load_tiny, packed_row, write_checkpoint

from qlora_train.memory.activations import Activation, choose_activations, kept_bytes_of_layer

KEEP, RECOMPUTE = Activation.KEEP, Activation.RECOMPUTE


@pytest.mark.parametrize(
    ("free_bytes", "num_kept"), [(0, 0), (399, 0), (400, 1), (799, 1), (800, 2), (1200, 3), (10**9, 3)]
)
def test_half_of_the_free_memory_holds_the_last_layers(free_bytes: int, num_kept: int) -> None:
    # 100 bytes x 2 micro-batches = 200 a layer, out of half of what is free.
    expected = (RECOMPUTE,) * (3 - num_kept) + (KEEP,) * num_kept
    assert choose_activations(3, 100, num_micro_batches=2, free_bytes=free_bytes) == expected


def test_the_recipes_words() -> None:
    assert (KEEP, RECOMPUTE) == ("keep", "recompute")


def test_kept_bytes_grow_with_the_row_and_count_no_weights(tmp_path: Path) -> None:
    folder = write_checkpoint(tmp_path)
    decoder, factors = load_tiny(folder)
    short, long = (kept_bytes_of_layer(decoder, packed_row([n, n])) for n in (32, 64))
    assert short > 0
    # Linear in the row but for the factors, which are there anyway.
    assert abs(long - 2 * short) <= 0.05 * long
    assert factors.gradient.count_nonzero() == 0


def test_kept_bytes_are_what_the_layer_must_remember(tmp_path: Path) -> None:
    decoder, _ = load_tiny(write_checkpoint(tmp_path), rank=4)
    num_tokens, hidden, intermediate, rank = 64, 64, 112, 4
    measured = kept_bytes_of_layer(decoder, packed_row([40, 24]))
    # Inputs of the linears (the norms' outputs, attention's, the MLP's product), h = x A^T of all seven, two
    # of gate, up and its activation: the least that any correct backward pass needs.
    least = 4 * num_tokens * (3 * hidden + 3 * intermediate + 7 * rank)
    assert least <= measured <= 6 * least


def test_kept_bytes_halve_in_16_bits_and_grow_without_the_fused_linear(tmp_path: Path) -> None:
    folder, tokens = write_checkpoint(tmp_path), packed_row([40, 24])
    decoder, _ = load_tiny(folder)
    full = kept_bytes_of_layer(decoder, tokens)
    half = kept_bytes_of_layer(load_tiny(folder, dtype=torch.bfloat16)[0], tokens)
    assert 0.4 * full < half < 0.85 * full
    for linear in decoder.linears.values():
        linear.use_autograd = True
    weights_bytes = 4 * sum(lin.in_features * lin.out_features for lin in decoder.linears_of(2))
    assert kept_bytes_of_layer(decoder, tokens) >= full + 0.9 * weights_bytes
