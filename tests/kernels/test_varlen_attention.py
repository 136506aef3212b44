"""Who is served by torch's varlen kernel, and how it is called: through a stand-in that notes what it was
given and attends by the definition. What the kernel itself computes is for tests/gpu."""

from __future__ import annotations

import re
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from simulated_gpu.fixture import SimulatedGpu
from tiny_models import load_tiny, packed_row, resident_plan, write_checkpoint
from torch import Tensor, nn

from qlora_train.device.description import CPU, DeviceDescription, Varlen
from qlora_train.kernels.varlen_attention import VarlenAttention, varlen_for, what_works
from qlora_train.kernels.varlen_attention import _plain as plain_attention
from qlora_train.model.attention import AttentionKernels, DocumentLayout, packed_attention
from qlora_train.walk.layer_walk import LayerWalk

TURING, AMPERE, ADA, HOPPER, BLACKWELL = (7, 5), (8, 0), (8, 9), (9, 0), (12, 0)
LENGTHS = [5, 1, 12, 3, 17]


def card(capability: tuple[int, int], varlen: Varlen = "grouped heads") -> DeviceDescription:
    return DeviceDescription("cuda", capability, 28, varlen, has_liger=False, cublas_workspace=None, index=0)


def kernels(function: Any, capability: tuple[int, int] = ADA) -> AttentionKernels:
    """As on a card of this capability, where torch's function is `function`."""
    device = card(capability)
    return AttentionKernels(device, VarlenAttention(function, device), blocks_documents=False)


@pytest.mark.parametrize("capability", [TURING, AMPERE, ADA, HOPPER, BLACKWELL])
def test_the_layers_that_a_capability_serves(capability) -> None:
    has_flash = capability >= AMPERE
    asked = {"grouped": True, "has_softcap": False}
    assert card(capability).varlen_serves(2, 128, **asked) == has_flash
    assert not card(capability).varlen_serves(4, 128, **asked)  # float32
    assert not card(capability).varlen_serves(2, 128, grouped=True, has_softcap=True)
    assert not CPU.varlen_serves(2, 128, **asked)


@pytest.mark.parametrize(
    ("size", "is_served"),
    [(8, True), (64, True), (80, True), (84, False), (128, True), (192, True), (200, False), (224, False)]
    + [(232, True), (256, True), (264, False), (512, False)],
)
def test_the_head_sizes_that_are_served(size, is_served) -> None:
    assert card(ADA).flash_serves(2, size) == is_served
    assert card(ADA).varlen_serves(2, size, grouped=True, has_softcap=False) == is_served


@pytest.mark.parametrize(
    ("varlen", "alone", "grouped"),
    [("none", False, False), ("equal heads", True, False), ("grouped heads", True, True)],
)
def test_what_torchs_function_was_found_to_do_decides(varlen, alone, grouped) -> None:
    device = card(ADA, varlen)
    assert device.varlen_serves(2, 64, grouped=False, has_softcap=False) == alone
    assert device.varlen_serves(2, 64, grouped=True, has_softcap=False) == grouped
    assert (varlen_for(device) is None) == (varlen == "none")


def test_values_of_another_size_are_not_served() -> None:
    query, key, value = (torch.empty(1, 2, 3, size, dtype=torch.bfloat16) for size in (192, 192, 128))
    assert not VarlenAttention(Recorder(), card(ADA)).serves(query, key, value, None)
    assert VarlenAttention(Recorder(), card(ADA)).serves(query, key, key, None)


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
    fast = kernels(recorder, AMPERE)
    results = []
    for chosen in (fast, fast.plain()):
        qkv = random_qkv(heads, kv_heads)
        out, _ = packed_attention(
            nn.Identity(), *qkv, None, documents=layout, attention_kernels=chosen, **rule
        )
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
    fast = kernels(recorder, capability)
    outputs = [
        packed_attention(nn.Identity(), *qkv, None, documents=layout, attention_kernels=chosen, **rule)[0]
        for chosen in (fast, fast.plain())
    ]
    assert not recorder.calls and torch.equal(*outputs)


def test_decoding_does_not_ask_it() -> None:
    recorder = Recorder()
    query = torch.randn(3, 4, 1, 16, dtype=torch.bfloat16)
    key, value = torch.randn(2, 3, 2, 9, 16, dtype=torch.bfloat16)
    lengths = torch.tensor([4, 9, 1])
    fast = kernels(recorder)
    packed_attention(nn.Identity(), query, key, value, None, kv_lengths=lengths, attention_kernels=fast)
    assert not recorder.calls


def test_a_walk_asks_it_once_per_layer_and_pass_but_not_in_reference_mode(tmp_path) -> None:
    folder = write_checkpoint(tmp_path, "mistral")
    tokens = packed_row([9, 20, 4, 15])
    losses = []
    for reference in (False, True):
        decoder, lora = load_tiny(folder, dtype=torch.bfloat16)
        recorder = Recorder()
        decoder.run_with(replace(decoder.kernels, attention=kernels(recorder)))
        walk = LayerWalk(decoder, lora, resident_plan(*["recompute"] * 3), reference=reference)
        losses.append(walk.accumulate([tokens], seed=0, step=0, num_supervised=30).item())
        expected = {"max_q": 20, "max_k": 20, "scale": 0.25, "window_size": (7, 0), "gqa": True}
        assert recorder.calls == ([] if reference else [expected] * 6)
    assert losses[0] == pytest.approx(losses[1], rel=1e-2)


class OfTorch211(Recorder):
    """Shares key heads, as the kernel below it does, but has no word for it."""

    def __call__(self, query, key, value, cu_q, cu_k, max_q, max_k, *, scale=None, window_size=(-1, -1)):
        query, key, value = self.before(query, key, value)
        options = {"scale": scale, "window_size": window_size, "enable_gqa": True}
        return super().__call__(query, key, value, cu_q, cu_k, max_q, max_k, **options)

    def before(self, query, key, value):
        return query, key, value


class NotGrouped(OfTorch211):
    def before(self, query, key, value):
        if query.shape[1] != key.shape[1]:
            raise ValueError("as many key heads as query heads, please")
        return query, key, value


class WrongWithGrouped(OfTorch211):
    def before(self, query, key, value):
        return query, key, value * (0.5 if query.shape[1] != key.shape[1] else 1)


class WrongGoingBack(OfTorch211):
    """The right values, and twice the gradient of q."""

    def before(self, query, key, value):
        return query + (query - query.detach()), key, value


class WithoutWindow(Recorder):
    def __call__(self, query, key, value, cu_q, cu_k, max_q, max_k, *, window_size=(-1, -1), scale=None):
        return super().__call__(query, key, value, cu_q, cu_k, max_q, max_k, scale=scale, window_size=(-1, 0))


def of_torch_2_10(query, key, value, cu_q, cu_k, max_q, max_k, is_causal=False):
    raise AssertionError("it has no scale: not tried")


@pytest.mark.parametrize(
    ("function", "found", "said"),
    [
        (Recorder(), "grouped heads", None),
        (OfTorch211(), "grouped heads", None),
        (NotGrouped(), "equal heads", r"key head of its own \(ValueError: as many key heads"),
        (WrongWithGrouped(), "equal heads", r"its results are off by"),
        (WrongGoingBack(), "none", r"is not used \(its results are off by"),
        (WithoutWindow(), "none", r"is not used \(its results are off by"),
        (of_torch_2_10, "none", None),
    ],
)
def test_what_works_is_found_by_doing_it(function, found, said, recwarn) -> None:
    assert what_works(function, torch.device("cpu"), ADA) == found
    warned = [str(w.message) for w in recwarn]
    assert len(warned) == (said is not None) and all(re.search(said or "", line) for line in warned)


def test_the_definition_is_computed_on_the_cpu(simulated_gpu: SimulatedGpu) -> None:
    """A product on the device would settle for the whole process whether cuBLAS is deterministic."""
    inputs = [torch.ones(1, 2, 13, 8, dtype=torch.float16, device=simulated_gpu.device) for _ in range(3)]
    assert {t.device.type for t in plain_attention(inputs, 0.1, 3)} == {"cpu"}


@pytest.mark.parametrize("without_gradients", [torch.no_grad, torch.inference_mode])
def test_it_is_found_where_gradients_are_off(without_gradients, recwarn) -> None:
    with without_gradients():
        assert what_works(Recorder(), torch.device("cpu"), ADA) == "grouped heads"
    assert not recwarn
