"""Attention on the simulated GPU: what CUDA would choose, with the CPU's bits."""

from __future__ import annotations

import inspect
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention.varlen import varlen_attn

from simulated_gpu import device_module as sim
from simulated_gpu.attention import cuda_would_fuse
from simulated_gpu.fixture import SimulatedGpu

GROUPED: dict[str, Any] = (
    {"enable_gqa": True} if "enable_gqa" in inspect.signature(varlen_attn).parameters else {}
)


def heads(*sizes: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> Tensor:
    return torch.randn(*sizes, generator=torch.Generator().manual_seed(seed)).to(dtype)


def attend(
    device: str, dtype: torch.dtype, key_heads: int, mask: Tensor | None, causal: bool
) -> list[Tensor]:
    q = heads(2, 4, 9, 16, dtype=dtype, seed=1)
    k, v = (heads(2, key_heads, 9, 16, dtype=dtype, seed=seed) for seed in (2, 3))
    q, k, v = (t.to(device).requires_grad_() for t in (q, k, v))
    mask = None if mask is None else mask.to(device)
    out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=causal, enable_gqa=key_heads != 4)
    (out.float() ** 2).sum().backward()
    return [t.detach().cpu() for t in (out, q.grad, k.grad, v.grad)]  # type: ignore[union-attr]


@pytest.mark.parametrize("dtype", (torch.float32, torch.float16, torch.bfloat16))
@pytest.mark.parametrize("key_heads", (4, 2))
@pytest.mark.parametrize("kind", ("full", "causal", "bool", "float"))
def test_sdpa_has_the_cpus_bits(
    simulated_gpu: SimulatedGpu, dtype: torch.dtype, key_heads: int, kind: str
) -> None:
    mask = torch.ones(9, 9).tril().bool() if kind == "bool" else None
    mask = torch.randn(9, 9).to(dtype) if kind == "float" else mask
    fuses = not (key_heads == 2 and (mask is not None or dtype == torch.float32))
    ours, theirs = (attend(device, dtype, key_heads, mask, kind == "causal") for device in ("sim", "cpu"))
    tolerance = 0 if fuses else 1e-5 if dtype == torch.float32 else 0.05
    for a, b in zip(ours, theirs, strict=True):
        assert torch.allclose(a.float(), b.float(), atol=tolerance, rtol=tolerance)
    fused = simulated_gpu.num_calls["aten::_scaled_dot_product_flash_attention_for_cpu"]
    assert bool(fused) == fuses, "grouped heads are fused by flash alone, which takes no mask and no float32"


def test_what_cuda_fuses() -> None:
    def fuses(capability: tuple[int, int], dtype: torch.dtype, *, size: int = 64, **kinds: Any) -> bool:
        query = torch.empty(1, 4, 8, size, dtype=dtype)
        key = torch.empty(1, kinds.get("key_heads", 4), 8, size, dtype=dtype)
        return cuda_would_fuse(capability, query, key, key, kinds.get("mask"))

    mask = torch.zeros(8, 8)
    assert fuses((8, 0), torch.bfloat16, key_heads=2) and not fuses((7, 5), torch.bfloat16)
    assert fuses((7, 5), torch.float16) and not fuses((7, 5), torch.float16, key_heads=2)
    assert fuses((8, 9), torch.float32, mask=mask) and not fuses((8, 9), torch.float32, key_heads=2)
    assert fuses((8, 9), torch.float16, size=36) and not fuses((7, 5), torch.float16, size=36)


def test_fused_attention_keeps_no_scores(simulated_gpu: SimulatedGpu) -> None:
    q = heads(1, 2, 512, 16).to("sim").requires_grad_()
    before = simulated_gpu.live_bytes()
    out = F.scaled_dot_product_attention(q, q, q, is_causal=True)
    assert simulated_gpu.peak_bytes() - before < 2 * 512 * 512 * 4 // 4
    out.sum().backward()


CASES = {
    "documents": ([3, 5, 1], None),
    "empty": ([0, 4, 0, 0, 5, 0], None),
    "window": ([7, 2, 4], 3),
    "wide": ([4, 3], 100),
}


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("key_heads", (4, 2))
@pytest.mark.parametrize("dtype", (torch.bfloat16, torch.float16))
def test_flash_of_variable_length_is_sdpa_per_document(
    simulated_gpu: SimulatedGpu, case: str, key_heads: int, dtype: torch.dtype
) -> None:
    lengths, window = CASES[case]
    starts = [0, *torch.tensor(lengths).cumsum(0).tolist()]
    total = starts[-1]
    query = heads(total, 4, 16, dtype=dtype, seed=1)
    key, value = (heads(total, key_heads, 16, dtype=dtype, seed=seed) for seed in (2, 3))
    q, k, v = (t.to("sim").requires_grad_() for t in (query, key, value))
    cu_seqlens = torch.tensor(starts, dtype=torch.int32, device="sim")
    grouped: dict[str, Any] = GROUPED if key_heads != 4 else {}
    size = (-1 if window is None else window - 1, 0)
    arguments = (cu_seqlens, cu_seqlens, max(lengths), max(lengths))
    simulated_gpu.host_reads.clear()
    out = varlen_attn(q, k, v, *arguments, scale=0.3, window_size=size, **grouped)
    assert isinstance(out, Tensor) and out.shape == query.shape
    out.float().square().sum().backward()
    assert not simulated_gpu.host_reads.values
    a, b, c = (t.clone().requires_grad_() for t in (query, key, value))
    expected = reference(a, b, c, starts, window)
    expected.float().square().sum().backward()
    pairs = ((out, expected), (q.grad, a.grad), (k.grad, b.grad), (v.grad, c.grad))
    for ours, theirs in pairs:
        assert ours is not None and theirs is not None
        assert torch.allclose(ours.detach().cpu().float(), theirs.detach().float(), atol=2e-2, rtol=2e-2)
        assert torch.equal(ours.detach().cpu(), theirs.detach()) or key_heads != 4


def reference(q: Tensor, k: Tensor, v: Tensor, starts: list[int], window: int | None) -> Tensor:
    """[T, heads, d], document by document."""
    parts = []
    for a, b in zip(starts, starts[1:], strict=False):
        mask = None
        if window is not None and window < b - a:
            distance = torch.arange(b - a)[:, None] - torch.arange(b - a)[None]
            mask = (distance >= 0) & (distance < window)
        query, key, value = (t[a:b].transpose(0, 1).unsqueeze(0) for t in (q, k, v))
        grouped, causal = q.shape[1] != k.shape[1], mask is None
        out = F.scaled_dot_product_attention(
            query, key, value, attn_mask=mask, is_causal=causal, scale=0.3, enable_gqa=grouped
        )
        parts.append(out[0].transpose(0, 1))
    return torch.cat(parts)


def test_flash_is_refused_as_by_cuda(simulated_gpu: SimulatedGpu) -> None:
    cu_seqlens = torch.tensor([0, 4], dtype=torch.int32, device="sim")

    def call(q: Tensor, starts: Tensor = cu_seqlens) -> None:
        varlen_attn(q, q, q, starts, starts, 4, 4, window_size=(-1, 0))

    good = torch.ones(4, 2, 16, dtype=torch.bfloat16, device="sim")
    call(good)
    with pytest.raises(RuntimeError, match="only support fp16 and bf16"):
        call(good.float())
    with pytest.raises(RuntimeError, match="multiple of 8"):
        call(torch.ones(4, 2, 12, dtype=torch.bfloat16, device="sim"))
    with pytest.raises(RuntimeError, match="cu_seqlens"):
        call(good, cu_seqlens.long())
    with pytest.raises(RuntimeError, match="cu_seqlens"):
        call(good, cu_seqlens.cpu())
    simulated_gpu.settings.capability = (7, 5)
    assert not sim.is_bf16_supported(including_emulation=False)
    with pytest.raises(RuntimeError, match="Ampere GPUs or newer"):
        call(good.half())
