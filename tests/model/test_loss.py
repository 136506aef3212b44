"""Chunked cross-entropy against the formula and against transformers' way of computing it."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from tiny_models import VOCABULARY_SIZE, load_tiny, packed_row, write_checkpoint
from torch import Tensor

from qlora_train.model import loss as loss_module
from qlora_train.model.decoder import FrozenDecoder
from qlora_train.model.loss import chunk_size, chunked_loss, reference_loss
from qlora_train.model.packed_tokens import PackedTokens


def hidden_states(tokens: PackedTokens, dtype: torch.dtype = torch.float32) -> Tensor:
    total = tokens.token_ids.shape[1]
    return torch.randn(1, total, 64, generator=torch.Generator().manual_seed(2)).to(dtype)


def formula(decoder: FrozenDecoder, x: Tensor, tokens: PackedTokens, logits_scale: float = 1.0):
    """(loss sum, dL/dx) with the norm and the head written out, in fp64."""
    leaf = x.double().requires_grad_()
    epsilon = decoder.config.rms_norm_eps
    normed = leaf * torch.rsqrt(leaf.pow(2).mean(-1, keepdim=True) + epsilon) * decoder.norm.weight.double()
    logits = normed[0] @ decoder._causal_lm.lm_head.weight.double().t() * logits_scale
    chosen = logits[tokens.supervised]
    labels = tokens.labels[tokens.supervised]
    loss = (chosen.logsumexp(-1) - chosen.gather(1, labels[:, None])[:, 0]).sum()
    (gradient,) = torch.autograd.grad(loss, leaf)
    return loss.detach(), gradient


@pytest.mark.parametrize(
    ("family", "logits_scale"), [("llama", 1.0), ("llama-tied", 1.0), ("granite", 1 / 2.5)]
)
@pytest.mark.parametrize(
    "lengths", [[60, 3, 40], [2], [17, 1]], ids=str
)  # 98 supervised: not a multiple of 16
def test_chunks_and_reference_equal_the_formula(
    tmp_path: Path, family: str, logits_scale: float, lengths: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    decoder, _ = load_tiny(write_checkpoint(tmp_path, family))
    tokens = packed_row(lengths, unsupervised=0)
    x = hidden_states(tokens)
    expected_loss, expected = formula(decoder, x, tokens, logits_scale)
    expected_loss = expected_loss.float()

    reference, reference_gradient = reference_loss(decoder, x, tokens, num_supervised=8, loss_scale=4.0)
    torch.testing.assert_close(reference, expected_loss, rtol=1e-5, atol=0)
    assert (reference_gradient - 0.5 * expected).norm() <= 1e-5 * (0.5 * expected).norm()

    for num_tokens in (16, 17, 33, 10_000):
        monkeypatch.setattr(loss_module, "CHUNK_LOGITS_BYTES", 4 * VOCABULARY_SIZE * num_tokens)
        assert chunk_size(VOCABULARY_SIZE) == num_tokens
        loss, gradient = chunked_loss(decoder, x, tokens, gradient_scale=0.5)
        torch.testing.assert_close(loss, expected_loss, rtol=1e-5, atol=0)
        assert (gradient - 0.5 * expected).norm() <= 1e-5 * (0.5 * expected).norm()
        without, none = chunked_loss(decoder, x, tokens, gradient_scale=None)
        assert none is None and torch.equal(without, loss)


def test_no_more_logits_than_a_chunk_exist_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    decoder, _ = load_tiny(write_checkpoint(tmp_path))
    monkeypatch.setattr(loss_module, "CHUNK_LOGITS_BYTES", 4 * VOCABULARY_SIZE * 20)
    sizes: list[int] = []
    decoder._causal_lm.lm_head.register_forward_hook(lambda _m, _i, out: sizes.append(out.shape[1]))
    tokens = packed_row([60, 3, 40], unsupervised=5)
    chunked_loss(decoder, hidden_states(tokens), tokens, gradient_scale=1.0)
    assert sum(sizes) == len(tokens.supervised) == 54 + 34
    assert sizes == [20, 20, 20, 20, 8]


def test_bf16_stays_close_to_torch_cross_entropy(tmp_path: Path) -> None:
    decoder, _ = load_tiny(write_checkpoint(tmp_path), dtype=torch.bfloat16)
    tokens = packed_row([30, 20])
    x = hidden_states(tokens, torch.bfloat16)
    loss, gradient = chunked_loss(decoder, x, tokens, gradient_scale=1.0)
    assert loss.dtype == torch.float32 and gradient.dtype == torch.bfloat16
    with torch.no_grad():
        logits = decoder.logits(decoder.norm(x))[0].float()
    torch.testing.assert_close(
        loss, F.cross_entropy(logits, tokens.labels, reduction="sum"), rtol=1e-5, atol=0
    )
    reference, reference_gradient = reference_loss(decoder, x, tokens, num_supervised=1, loss_scale=1.0)
    torch.testing.assert_close(loss, reference, rtol=1e-5, atol=0)
    assert (gradient - reference_gradient).float().norm() <= 1e-2 * reference_gradient.float().norm()


def test_without_supervised_tokens_loss_and_gradient_are_zero(tmp_path: Path) -> None:
    decoder, _ = load_tiny(write_checkpoint(tmp_path))
    tokens = packed_row([1, 1, 1])
    assert len(tokens.supervised) == 0
    loss, gradient = chunked_loss(decoder, hidden_states(tokens), tokens, gradient_scale=1.0)
    assert loss == 0.0 and gradient.shape == (1, 3, 64) and gradient.count_nonzero() == 0
    reference, reference_gradient = reference_loss(
        decoder, hidden_states(tokens), tokens, num_supervised=5, loss_scale=1.0
    )
    assert reference == 0.0 and reference_gradient.count_nonzero() == 0


def test_the_chunk_never_falls_below_16_tokens() -> None:
    assert chunk_size(128_256) == 128 * 2**20 // (4 * 128_256) == 261
    assert chunk_size(10**9) == 16
