"""Who is served by torch's varlen kernel, and how it is called: through a stand-in that notes what it was
given and attends by the definition. What the kernel itself computes is for tests/gpu."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from tiny_models import load_tiny, packed_row, resident_plan, write_checkpoint
from torch import Tensor, nn
from torch.nn.attention.varlen import varlen_attn

from qlora_train.kernels.varlen_attention import (
    Heads,
    VarlenAttention,
    _parameters,
    attention_kernel,
    flash_serves,
    varlen_attention,
)
from qlora_train.model.attention import DocumentLayout, packed_attention
from qlora_train.train.walk import LayerWalk

TURING, AMPERE, ADA, HOPPER, BLACKWELL = (7, 5), (8, 0), (8, 9), (9, 0), (12, 0)
GROUPED = Heads(32, 8, 128, 128)
COMMON = frozenset({"query", "key", "value", "cu_seq_q", "cu_seq_k", "max_q", "max_k", "return_aux"})
TORCH_2_10 = COMMON | {"is_causal"}
TORCH_2_11 = COMMON | {"scale", "window_size"}
TORCH_2_12 = TORCH_2_11 | {"enable_gqa", "seqused_k", "block_table", "num_splits"}
LENGTHS = [5, 1, 12, 3, 17]


@pytest.mark.parametrize(
    ("capability", "kernel"),
    [
        (TURING, "documents"),
        (AMPERE, "varlen"),
        (ADA, "varlen"),
        (HOPPER, "varlen"),
        (BLACKWELL, "varlen"),
    ],
)
def test_the_kernel_of_a_capability(capability, kernel) -> None:
    for dtype in (torch.float16, torch.bfloat16):
        assert attention_kernel(capability, dtype, GROUPED, False, TORCH_2_12) == kernel
    assert attention_kernel(capability, torch.float32, GROUPED, False, TORCH_2_12) == "documents"
    assert attention_kernel(capability, torch.bfloat16, GROUPED, True, TORCH_2_12) == "documents"


@pytest.mark.parametrize(
    ("size", "is_served"),
    [(8, True), (64, True), (80, True), (84, False), (128, True), (192, True), (200, False), (224, False)]
    + [(232, True), (256, True), (264, False), (512, False)],
)
def test_the_kernel_of_a_head_size(size, is_served) -> None:
    heads = Heads(8, 2, size, size)
    assert flash_serves(ADA, torch.bfloat16, heads) == is_served
    kernel = attention_kernel(ADA, torch.bfloat16, heads, False, TORCH_2_12)
    assert kernel == ("varlen" if is_served else "documents")
    assert not flash_serves(ADA, torch.bfloat16, Heads(8, 2, 192, 128))  # values of another size


@pytest.mark.parametrize(
    ("parameters", "alone", "grouped"),
    [
        (frozenset(), "documents", "documents"),
        (TORCH_2_10, "documents", "documents"),
        (TORCH_2_11, "varlen", "documents"),
        (TORCH_2_12, "varlen", "varlen"),
    ],
)
def test_the_kernel_of_a_version_of_torch(parameters, alone, grouped) -> None:
    kernels = [
        attention_kernel(ADA, torch.float16, heads, False, parameters)
        for heads in (Heads(8, 8, 64, 64), GROUPED)
    ]
    assert kernels == [alone, grouped]


def test_the_installed_torch_can_say_all_of_it() -> None:
    kernel = attention_kernel(ADA, torch.bfloat16, Heads(8, 8, 64, 64), False, _parameters(varlen_attn))
    assert kernel == "varlen"


def test_nothing_is_offered_without_a_gpu() -> None:
    assert varlen_attention(torch.device("cpu")) is None


class Recorder:
    """Called like `varlen_attn` of torch 2.12 and later; `calls`: what it was called with, tensors aside."""

    def __init__(self) -> None:
        self.calls: list[dict[str, Any]] = []

    def __call__(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        cu_seq_q: Tensor,
        cu_seq_k: Tensor | None,
        max_q: int,
        max_k: int,
        *,
        scale: float | None = None,
        window_size: tuple[int, int] = (-1, -1),
        enable_gqa: bool = False,
    ) -> Tensor:
        self.calls.append(
            {"max_q": max_q, "max_k": max_k, "scale": scale, "window_size": window_size, "gqa": enable_gqa}
        )
        assert cu_seq_q is cu_seq_k and cu_seq_q.dtype == torch.int32
        assert query.stride(-1) == key.stride(-1) == value.stride(-1) == 1
        before, after = window_size
        assert after == 0 and (enable_gqa or query.shape[1] == key.shape[1])
        parts = []
        for start, stop in zip(cu_seq_q.tolist(), cu_seq_q.tolist()[1:], strict=False):
            q, k, v = (t[start:stop].transpose(0, 1).float() for t in (query, key, value))
            k, v = (t.repeat_interleave(q.shape[0] // k.shape[0], dim=0) for t in (k, v))
            scores = q @ k.transpose(1, 2) * (q.shape[-1] ** -0.5 if scale is None else scale)
            distance = torch.arange(stop - start)[:, None] - torch.arange(stop - start)
            visible = (distance >= 0) & ((distance <= before) | (before == -1))
            scores = scores.masked_fill(~visible, float("-inf"))
            parts.append((torch.softmax(scores, -1) @ v).transpose(0, 1))
        return torch.cat(parts).to(query.dtype)


def random_qkv(heads: int, kv_heads: int, size: int = 16, dtype: torch.dtype = torch.bfloat16):
    generator = torch.Generator().manual_seed(heads)
    total = sum(LENGTHS)
    return [
        torch.randn(1, n, total, size, generator=generator).to(dtype).requires_grad_()
        for n in (heads, kv_heads, kv_heads)
    ]


@pytest.mark.parametrize(
    ("rule", "said"),
    [
        ({}, {"scale": None, "window_size": (-1, 0)}),
        ({"scaling": 0.3}, {"scale": 0.3, "window_size": (-1, 0)}),
        ({"sliding_window": 4}, {"scale": None, "window_size": (3, 0)}),
        ({"sliding_window": 1}, {"scale": None, "window_size": (0, 0)}),
        ({"sliding_window": 16}, {"scale": None, "window_size": (15, 0)}),
        ({"sliding_window": 17}, {"scale": None, "window_size": (-1, 0)}),  # the longest document
    ],
)
@pytest.mark.parametrize(("heads", "kv_heads"), [(4, 4), (4, 2)])
def test_one_call_says_what_the_family_asked_for(rule, said, heads, kv_heads) -> None:
    layout = DocumentLayout.of(np.cumsum([0, *LENGTHS]), "cpu")
    recorder = Recorder()
    varlen = VarlenAttention(recorder, AMPERE)
    results = []
    for kernel in (varlen, None):
        qkv = random_qkv(heads, kv_heads)
        out, _ = packed_attention(nn.Identity(), *qkv, None, documents=layout, varlen=kernel, **rule)
        out.backward(torch.ones_like(out).cumsum(1) / sum(LENGTHS))
        results.append([out, *(t.grad for t in qkv)])
    assert recorder.calls == [{"max_q": 17, "max_k": 17, "gqa": heads != kv_heads} | said]
    for ours, reference in zip(*results, strict=True):
        assert ours.shape == reference.shape
        # a window of 1 leaves nothing of the gradients of q and k but rounding
        size = max(reference.float().norm(), 0.1)
        assert (ours - reference).float().norm() <= 2e-2 * size


@pytest.mark.parametrize(
    ("capability", "size", "dtype", "rule"),
    [
        (TURING, 16, torch.float16, {}),
        (ADA, 16, torch.float32, {}),
        (ADA, 20, torch.bfloat16, {}),
        (ADA, 16, torch.bfloat16, {"softcap": 30.0}),
    ],
)
def test_what_it_cannot_serve_goes_by_document(capability, size, dtype, rule) -> None:
    layout = DocumentLayout.of(np.cumsum([0, *LENGTHS]), "cpu")
    recorder, qkv = Recorder(), random_qkv(4, 2, size, dtype)
    outputs = [
        packed_attention(nn.Identity(), *qkv, None, documents=layout, varlen=kernel, **rule)[0]
        for kernel in (VarlenAttention(recorder, capability), None)
    ]
    assert not recorder.calls and torch.equal(*outputs)


def test_decoding_does_not_ask_it() -> None:
    recorder = Recorder()
    query = torch.randn(3, 4, 1, 16, dtype=torch.bfloat16)
    key, value = torch.randn(2, 3, 2, 9, 16, dtype=torch.bfloat16)
    lengths = torch.tensor([4, 9, 1])
    varlen = VarlenAttention(recorder, ADA)
    packed_attention(nn.Identity(), query, key, value, None, kv_lengths=lengths, varlen=varlen)
    assert not recorder.calls


def test_a_walk_asks_it_once_per_layer_and_pass_but_not_in_reference_mode(tmp_path) -> None:
    folder = write_checkpoint(tmp_path, "mistral")
    tokens = packed_row([9, 20, 4, 15])
    losses = []
    for reference in (False, True):
        decoder, factors = load_tiny(folder, dtype=torch.bfloat16)
        recorder = Recorder()
        decoder.varlen = VarlenAttention(recorder, ADA)
        walk = LayerWalk(decoder, factors, resident_plan(*["recompute"] * 3), reference=reference)
        losses.append(walk.accumulate([tokens], seed=0, step=0, num_supervised=30).item())
        expected = {"max_q": 20, "max_k": 20, "scale": 0.25, "window_size": (7, 0), "gqa": True}
        assert recorder.calls == ([] if reference else [expected] * 6)
    assert losses[0] == pytest.approx(losses[1], rel=1e-2)
