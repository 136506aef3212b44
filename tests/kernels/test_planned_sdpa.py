"""Attention in a plan: which operation, what it saves, what it takes inside."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from gpu_stand_ins import flash_like, idle_flash_kernels
from torch import Tensor, nn
from torch.nn.attention.varlen import varlen_attn

from qlora_train.device.description import CPU, DeviceDescription
from qlora_train.device.memory_tracker import StorageMeter
from qlora_train.device.planned import PlannedDevice
from qlora_train.kernels.planned_sdpa import attention_scratch
from qlora_train.kernels.varlen_attention import VarlenAttention
from qlora_train.model.attention import AttentionKernels, DocumentLayout, packed_attention
from qlora_train.plan.planned_meter import PlannedMeter

AMPERE = DeviceDescription("cuda", (8, 6), 28, "grouped heads", has_liger=True, cublas_workspace=None)


def leaves(
    num_keys: int, num_tokens: int, size: int, dtype: torch.dtype, device: str = "meta"
) -> list[Tensor]:
    """Queries, keys and values [1, heads, T, d], tokens outside of heads in memory."""
    shapes = [(1, num_tokens, n, size) for n in (32, num_keys, num_keys)]
    rows = [torch.empty(shape, dtype=dtype, device=device).transpose(1, 2) for shape in shapes]
    return [row.requires_grad_() for row in rows]


def peak_going_back(
    card: DeviceDescription,
    qkv: list[Tensor],
    documents: tuple[int, ...],
    *,
    window: int | None = None,
    deterministic: bool = False,
    most: int = 0,
    scratch: bool = True,
) -> int:
    """Above the gradient of the output, with what the forward pass saved."""
    kernels = AttentionKernels.on(PlannedDevice(card), qkv[0].dtype)
    inside = attention_scratch(card, deterministic=deterministic, most_documents=most)
    layout = DocumentLayout.of(np.cumsum([0, *documents]), "meta")
    with PlannedMeter(inside if scratch else {}, may_write_scores=False) as meter:
        out, _ = packed_attention(
            nn.Identity(), *qkv, None, documents=layout, attention_kernels=kernels, sliding_window=window
        )
        gradient = torch.empty_like(out)
        meter.reset_peak()
        before = meter.live_bytes
        out.backward(gradient)
    for leaf in qkv:
        leaf.grad = None
    return meter.peak_bytes - before


@pytest.mark.parametrize(
    ("deterministic", "documents", "most", "num_sums", "rows"),
    [
        (False, (150, 150), 2, 1, 300 + 2 * 128),
        (False, (150, 150), 32, 1, 300 + 32 * 128),
        (True, (150, 150), 33, 1, 300 + 33 * 128),
        (True, (300,), 1, 4, 300 + 128),
        (True, (300,), 5, 4, 300 + 128),
        (True, (150, 150), 3, 2, 300 + 3 * 128),  # more than with the fewest or with the four that one is for
        (True, (150, 150), 4, 2, 300 + 3 * 128),
    ],
)
def test_sums_of_a_kernel_of_variable_length(deterministic, documents, most, num_sums, rows) -> None:
    """The most that any number of documents takes: gaps of many, or sums side by side of few."""
    card, qkv = replace(AMPERE, num_multiprocessors=128), leaves(32, 300, 64, torch.bfloat16)
    asked = {"deterministic": deterministic, "most": most}
    results = peak_going_back(card, qkv, documents, scratch=False)
    found = peak_going_back(card, qkv, documents, **asked) - results
    assert found == num_sums * rows * 32 * 64 * 4 + rows * 32 * 4


@pytest.mark.parametrize("num_keys", [8, 32])
@pytest.mark.parametrize(
    ("dtype", "window", "capability", "deterministic"),
    [
        (torch.float16, None, (8, 6), False),
        (torch.float16, None, (8, 6), True),
        (torch.float32, None, (8, 6), True),
        (torch.float16, None, (7, 5), False),
        (torch.float32, None, (7, 5), False),
        (torch.float16, 40, (8, 6), False),
    ],
)
def test_scratch_going_back_by_document(num_keys, dtype, window, capability, deterministic) -> None:
    """Three documents padded to 112 tokens, 32 heads of 72 numbers, by hand."""
    card = replace(AMPERE, capability=capability, varlen="none", num_multiprocessors=200)
    qkv = leaves(num_keys, 300, 72, dtype)
    documents, asked = (100, 100, 100), {"window": window, "deterministic": deterministic}
    found = peak_going_back(card, qkv, documents, **asked)
    found -= peak_going_back(card, qkv, documents, scratch=False, **asked)
    if dtype == torch.float16 and window is None and capability >= (8, 0):
        sums = 3 * 128 * 32 * 96 * 4 * (3 if deterministic else 1)  # 200 over 3 x 32
        expanded = 2 * 3 * 112 * 32 * 72 * 2 if num_keys < 32 else 0
        assert found == sums + 3 * 128 * 32 * 4 + expanded
    elif window is None:
        sums = 3 * 3 * 32 * 128 * 128 * 4 if dtype == torch.float16 else 0
        assert found == 3 * 32 * 112 * 4 + sums
    else:
        assert found > 0


@pytest.mark.parametrize("deterministic", [False, True])
@pytest.mark.parametrize("num_keys", [8, 32])
def test_scratch_is_that_of_torchs_own_code(num_keys: int, deterministic: bool) -> None:
    """Against a stand-in that makes the tensors that torch's C++ makes."""
    documents, card = (96, 51, 33), replace(AMPERE, num_multiprocessors=200)
    qkv = leaves(num_keys, sum(documents), 72, torch.bfloat16, "cpu")
    attend = flash_like(card.num_multiprocessors, deterministic=deterministic)
    kernels = AttentionKernels(card, VarlenAttention(attend, card), blocks_documents=False)
    layout = DocumentLayout.of(np.cumsum([0, *documents]), "cpu")
    with StorageMeter("cpu") as meter:
        out, _ = packed_attention(nn.Identity(), *qkv, None, documents=layout, attention_kernels=kernels)
        gradient = torch.empty_like(out)
        meter.reset_peak()
        before = meter.live_bytes
        out.backward(gradient)
    on_meta = leaves(num_keys, sum(documents), 72, torch.bfloat16)
    found = peak_going_back(card, on_meta, documents, deterministic=deterministic)
    unasked = 4 * 32 * sum(documents) + 16  # gradients of log-sums and seeds, which torch makes of zeros
    assert found == meter.peak_bytes - before + unasked


@pytest.mark.parametrize("num_keys", [8, 32])
def test_what_torchs_varlen_saves(num_keys: int) -> None:
    """The operation on the meta device against torch's own function above idle kernels."""

    def saved_bytes(device: str, kernels: AttentionKernels) -> int:
        saved: dict[int, int] = {}

        def note(t: Tensor) -> Tensor:
            saved[t.untyped_storage()._cdata] = t.untyped_storage().nbytes()
            return t

        qkv = leaves(num_keys, 96, 16, torch.bfloat16, device)
        layout = DocumentLayout.of(np.array([0, 60, 96]), device)
        with torch.autograd.graph.saved_tensors_hooks(note, lambda t: t):
            packed_attention(nn.Identity(), *qkv, None, documents=layout, attention_kernels=kernels)
        return sum(saved.values())

    with idle_flash_kernels():
        varlen = VarlenAttention(varlen_attn, AMPERE)
        expected = saved_bytes("cpu", AttentionKernels(AMPERE, varlen, blocks_documents=False))
    found = saved_bytes("meta", AttentionKernels.on(PlannedDevice(AMPERE), torch.bfloat16))
    assert abs(found - expected) <= 16  # two numbers that seed a dropout


def test_scores_that_no_kernel_of_a_card_writes_are_refused() -> None:
    q = torch.empty(1, 4, 8, 16, device="meta")
    with PlannedMeter({}, may_write_scores=False), pytest.raises(AssertionError, match="write all scores"):
        nn.functional.scaled_dot_product_attention(q, q, q)


def test_tensors_of_two_devices_are_refused() -> None:
    with PlannedMeter({}, may_write_scores=False), pytest.raises(AssertionError, match="two devices"):
        torch.empty(3, device="meta").masked_fill_(torch.ones(3, dtype=torch.bool), 0.0)


def test_a_cpu_takes_what_torch_would() -> None:
    kernels = AttentionKernels.on(PlannedDevice(replace(CPU, blocks_documents=False)), torch.float32)
    layout = DocumentLayout.of(np.array([0, 600]), "meta")
    with PlannedMeter({}, may_write_scores=True) as meter:
        qkv = leaves(8, 600, 64, torch.float32)
        packed_attention(nn.Identity(), *qkv, None, documents=layout, attention_kernels=kernels)
    assert meter.peak_bytes < 2 * 600 * 600 * 32 * 4, "all scores are written"
