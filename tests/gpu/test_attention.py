"""torch's varlen kernel and its SDPA kernels on real hardware against the definition, in float64."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from qlora_train.device.compute import ComputeDevice
from qlora_train.kernels.on_device import find_device
from qlora_train.model.attention import AttentionKernels, DocumentLayout, packed_attention

pytestmark = pytest.mark.gpu
ROWS = [[1], [7, 1, 130, 3, 64, 1], [1, 1, 1], [257, 1023, 5, 300]]
RULES = [{}, {"scaling": 0.3}, {"sliding_window": 1}, {"sliding_window": 33}, {"sliding_window": 256}]
HEADS = [(4, 4), (8, 2), (3, 1)]
TOLERANCES = {torch.bfloat16: 2e-2, torch.float16: 3e-3, torch.float32: 1e-5}
"""Relative error of a whole tensor; float32 only where it is asked for, without TF32."""


@pytest.fixture
def flash(device: ComputeDevice) -> AttentionKernels:
    kernels = AttentionKernels.on(device, torch.bfloat16)
    if kernels.varlen is None:
        pytest.skip("needs flash attention")
    return kernels


def random_qkv(device: torch.device, total: int, heads: int, kv_heads: int, size: int) -> list[Tensor]:
    """float64 [heads, T, size], and the gradient that comes back [T, heads, size]; exact in bfloat16."""
    generator = torch.Generator().manual_seed(total + heads)
    shapes = [(heads, total, size), (kv_heads, total, size), (kv_heads, total, size), (total, heads, size)]
    return [torch.randn(shape, generator=generator).to(device, torch.bfloat16).double() for shape in shapes]


def results(qkv: list[Tensor], attend) -> list[Tensor]:
    """Output and gradients of attend(q, k, v) for the last of `qkv` coming back, in float64."""
    q, k, v, direction = qkv
    leaves = [t.detach().clone().requires_grad_() for t in (q, k, v)]
    out = attend(*leaves)
    out.backward(direction.to(out.dtype))
    return [t.detach().double() for t in (out, *(leaf.grad for leaf in leaves))]


def defined(lengths: list[int], rule: dict):
    """softmax over a dense mask, one document at a time."""

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        k, v = (t.repeat_interleave(q.shape[0] // k.shape[0], dim=0) for t in (k, v))
        parts = []
        for n, q_part, k_part, v_part in zip(
            lengths, *(t.split(lengths, dim=1) for t in (q, k, v)), strict=True
        ):
            scores = q_part @ k_part.transpose(1, 2) * rule.get("scaling", q.shape[-1] ** -0.5)
            distance = torch.arange(n, device=q.device)[:, None] - torch.arange(n, device=q.device)
            visible = (distance >= 0) & (distance < rule.get("sliding_window", n))
            weights = torch.softmax(scores.masked_fill(~visible, float("-inf")), -1)
            parts.append((weights @ v_part).transpose(0, 1))
        return torch.cat(parts)

    return attend


def ours(lengths: list[int], rule: dict, dtype: torch.dtype, kernels: AttentionKernels):
    """`packed_attention` in `dtype`, by document or with the varlen kernel."""

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        layout = DocumentLayout.of(np.cumsum([0, *lengths]), q.device)
        # laid out as a model's projections are: tokens outside, heads inside
        laid_out = [t.to(dtype).transpose(0, 1).contiguous().transpose(0, 1)[None] for t in (q, k, v)]
        assert kernels.varlen is None or kernels.varlen.serves(*laid_out, None)
        packed = {"documents": layout, "attention_kernels": kernels}
        out, _ = packed_attention(nn.Identity(), *laid_out, None, **packed, **rule)
        return out[0]

    return attend


def check(found: list[Tensor], expected: list[Tensor], tolerance: float) -> None:
    for name, ours, exact in zip(("out", "dq", "dk", "dv"), found, expected, strict=True):
        size, unit = exact.norm().item(), exact.numel() ** 0.5
        size = unit if size < 1e-3 * unit else size  # one key in sight: dq and dk are nothing but rounding
        error = (ours - exact).norm().item() / size
        assert error <= tolerance, f"{name}: {error:.2e}"


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("heads", "kv_heads"), HEADS)
@pytest.mark.parametrize("rule", RULES, ids=str)
@pytest.mark.parametrize("lengths", ROWS, ids=str)
@pytest.mark.parametrize("size", [64, 128])
def test_varlen_attends_as_defined(gpu, flash, lengths, rule, heads, kv_heads, size, dtype) -> None:
    qkv = random_qkv(gpu, sum(lengths), heads, kv_heads, size)
    found = results(qkv, ours(lengths, rule, dtype, flash))
    check(found, results(qkv, defined(lengths, rule)), TOLERANCES[dtype])


@pytest.mark.parametrize("size", [8, 72, 80, 96, 192, 232, 256])
def test_every_head_size_said_to_be_served_is(gpu, flash, size) -> None:
    lengths = [33, 1, 200]
    qkv = random_qkv(gpu, sum(lengths), 4, 2, size)
    found = results(qkv, ours(lengths, {}, torch.bfloat16, flash))
    check(found, results(qkv, defined(lengths, {})), TOLERANCES[torch.bfloat16])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize(("heads", "kv_heads"), HEADS)
@pytest.mark.parametrize("rule", RULES, ids=str)
@pytest.mark.parametrize("lengths", ROWS, ids=str)
def test_by_document_attends_as_defined(gpu, device, lengths, rule, heads, kv_heads, dtype) -> None:
    if dtype == torch.bfloat16 and torch.cuda.get_device_capability(gpu) < (8, 0):
        pytest.skip("no bfloat16 units")
    qkv = random_qkv(gpu, sum(lengths), heads, kv_heads, 64)
    by_document = AttentionKernels.on(device, dtype).plain()
    found = results(qkv, ours(lengths, rule, dtype, by_document))
    check(found, results(qkv, defined(lengths, rule)), TOLERANCES[dtype])


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
@pytest.mark.parametrize("rule", [{}, {"sliding_window": 512}], ids=str)
def test_no_path_writes_all_scores(gpu, dtype, rule) -> None:
    """8,192 tokens, 8 heads: the scores alone would be 1 or 2 GiB."""
    fast = AttentionKernels.on(find_device(gpu), torch.bfloat16)
    for kernels in (fast, fast.plain()):
        leaves = [
            torch.randn(1, heads, 8192, 64, device=gpu, dtype=dtype, requires_grad=True)
            for heads in (8, 2, 2)
        ]
        layout = DocumentLayout.of(np.array([0, 8192]), gpu)
        torch.cuda.reset_peak_memory_stats(gpu)
        before = torch.cuda.memory_allocated(gpu)
        out, _ = packed_attention(
            nn.Identity(), *leaves, None, documents=layout, attention_kernels=kernels, **rule
        )
        out.sum().backward()
        assert torch.cuda.max_memory_allocated(gpu) - before < 400 * 2**20


def test_deterministic_algorithms_give_the_same_bits_again(gpu, flash) -> None:
    lengths = [700, 31, 293]
    qkv = random_qkv(gpu, sum(lengths), 8, 2, 128)
    torch.use_deterministic_algorithms(True)
    try:
        first, second = (results(qkv, ours(lengths, {}, torch.bfloat16, flash)) for _ in range(2))
    finally:
        torch.use_deterministic_algorithms(False)
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def test_attending_waits_for_nothing(gpu, flash) -> None:
    layout = DocumentLayout.of(np.array([0, 100, 301]), gpu)
    q, k, v = (torch.randn(1, 4, 301, 64, device=gpu, dtype=torch.float16) for _ in range(3))
    packed_attention(nn.Identity(), q, k, v, None, documents=layout, attention_kernels=flash)
    torch.cuda.set_sync_debug_mode("error")
    try:
        packed_attention(nn.Identity(), q, k, v, None, documents=layout, attention_kernels=flash)
    finally:
        torch.cuda.set_sync_debug_mode("default")
