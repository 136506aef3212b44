"""Tiled cross-entropy against the formula and against transformers' way of computing it."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from tiny_models import load_tiny, packed_row, write_checkpoint
from torch import Tensor

from qlora_train.model.decoder import FrozenDecoder
from qlora_train.model.loss import TiledLoss, reference_loss
from qlora_train.model.packed_tokens import PackedTokens


def tiled(
    decoder: FrozenDecoder,
    x: Tensor,
    tokens: PackedTokens,
    gradient_scale: float | None,
    block_tokens: int = 16,
    tile_rows: int = 40,
) -> tuple[Tensor, Tensor | None]:
    """(loss sum, dL/dx) of one micro-batch."""
    decoder.head.tile_rows = tile_rows
    loss, gradients = TiledLoss(decoder, block_tokens)([x], [tokens], gradient_scale)
    return loss, gradients[0] if gradients else None


def reference_of(decoder: FrozenDecoder, x: Tensor, tokens: PackedTokens, **scales: float):
    return reference_loss(decoder, decoder.whole_head(), x, tokens, **scales)


def hidden_states(tokens: PackedTokens, dtype: torch.dtype = torch.float32) -> Tensor:
    total = tokens.token_ids.shape[1]
    return torch.randn(1, total, 64, generator=torch.Generator().manual_seed(2)).to(dtype)


def formula(decoder: FrozenDecoder, x: Tensor, tokens: PackedTokens, logits_scale: float = 1.0):
    """(loss sum, dL/dx) with the norm and the head written out, in fp64."""
    leaf = x.double().requires_grad_()
    epsilon = decoder.config.rms_norm_eps
    normed = leaf * torch.rsqrt(leaf.pow(2).mean(-1, keepdim=True) + epsilon) * decoder.norm.weight.double()
    logits = normed[0] @ decoder.head.weight.double().t() * logits_scale
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
    tmp_path: Path, family: str, logits_scale: float, lengths: list[int]
) -> None:
    decoder, _ = load_tiny(write_checkpoint(tmp_path, family))
    tokens = packed_row(lengths, unsupervised=0)
    x = hidden_states(tokens)
    expected_loss, expected = formula(decoder, x, tokens, logits_scale)
    expected_loss = expected_loss.float()

    reference, reference_gradient = reference_of(decoder, x, tokens, num_supervised=8, loss_scale=4.0)
    torch.testing.assert_close(reference, expected_loss, rtol=1e-5, atol=0)
    assert (reference_gradient - 0.5 * expected).norm() <= 1e-5 * (0.5 * expected).norm()

    for block_tokens, tile_rows in ((16, 96), (17, 40), (33, 1), (10_000, 95), (10_000, 10_000)):
        loss, gradient = tiled(decoder, x, tokens, 0.5, block_tokens, tile_rows)
        torch.testing.assert_close(loss, expected_loss, rtol=1e-5, atol=0)
        assert (gradient - 0.5 * expected).norm() <= 1e-5 * (0.5 * expected).norm()
        without, none = tiled(decoder, x, tokens, None, block_tokens, tile_rows)
        assert none is None and torch.equal(without, loss)


def test_of_equal_logits_the_first_is_what_greedy_decoding_takes(tmp_path: Path) -> None:
    """Exact numbers: every product is a small integer."""
    decoder, _ = load_tiny(write_checkpoint(tmp_path))
    tokens = packed_row([60, 30], unsupervised=0)
    x = torch.randint(-1, 2, (1, 90, 64), generator=torch.Generator().manual_seed(3)).float()
    decoder.norm = torch.nn.Identity()
    decoder.head.weight.copy_(decoder.head.weight.sign() * (torch.arange(64) < 4))  # few values: many equal
    logits = x[0, tokens.supervised] @ decoder.head.weight.t()
    best = logits.argmax(-1)
    tokens.label_ids.device[::2] = best[::2]
    tokens.label_ids.host[:] = tokens.label_ids.device.numpy()
    labels = tokens.label_ids.device
    is_tied = logits.gather(1, labels[:, None])[:, 0] == logits.amax(-1)
    assert (is_tied & (labels != best)).any()
    for block_tokens, tile_rows in ((16, 7), (10_000, 10_000)):
        decoder.head.tile_rows = tile_rows
        [found] = TiledLoss(decoder, block_tokens).scores([x], [tokens])
        assert torch.equal(found.is_greedy, labels == best)
        expected = F.cross_entropy(logits, labels, reduction="none")
        torch.testing.assert_close(found.losses, expected)


@pytest.mark.parametrize(("cap", "family"), [(1.5, "gemma2"), (None, "gemma2")])
def test_a_capped_logit_has_the_gradient_of_the_cap(tmp_path: Path, cap: float | None, family: str) -> None:
    folder = write_checkpoint(tmp_path, family, final_logit_softcapping=cap, head_dim=16)
    decoder, _ = load_tiny(folder)
    tokens = packed_row([30, 9], unsupervised=0)
    x = hidden_states(tokens)
    expected_loss, expected = reference_of(decoder, x, tokens, num_supervised=1, loss_scale=1.0)
    loss, gradient = tiled(decoder, x, tokens, 1.0)
    torch.testing.assert_close(loss, expected_loss, rtol=1e-5, atol=0)
    assert (gradient - expected).norm() <= 1e-5 * expected.norm()


def test_large_logits_neither_overflow_nor_lose_the_maximum(tmp_path: Path) -> None:
    decoder, _ = load_tiny(write_checkpoint(tmp_path))
    decoder.head.weight.mul_(300)  # exp of the logits is beyond fp32
    tokens = packed_row([30], unsupervised=0)
    x = hidden_states(tokens)
    expected_loss, expected = formula(decoder, x, tokens)
    loss, gradient = tiled(decoder, x, tokens, 1.0, tile_rows=7)
    torch.testing.assert_close(loss, expected_loss.float(), rtol=1e-5, atol=0)
    assert (gradient - expected).norm() <= 1e-4 * expected.norm()


def test_a_group_is_the_sum_of_its_micro_batches(tmp_path: Path) -> None:
    decoder, _ = load_tiny(write_checkpoint(tmp_path))
    batches = [packed_row([30, 9], seed=1), packed_row([1, 1]), packed_row([25], seed=2)]
    xs = [hidden_states(tokens) for tokens in batches]
    alone = [tiled(decoder, x, tokens, 1.0) for x, tokens in zip(xs, batches, strict=True)]
    loss, gradients = TiledLoss(decoder, 16)(list(xs), batches, 1.0)
    torch.testing.assert_close(loss, torch.stack([one for one, _ in alone]).sum())
    assert all(torch.equal(ours, one) for ours, (_, one) in zip(gradients, alone, strict=True))


def test_no_more_logits_than_a_block_of_a_tile_exist_at_once(tmp_path: Path) -> None:
    decoder, _ = load_tiny(write_checkpoint(tmp_path))
    sizes: list[tuple[int, ...]] = []
    decoder._head_product.register_forward_hook(lambda _m, _i, out: sizes.append(tuple(out.shape[1:])))
    tokens = packed_row([60, 3, 40], unsupervised=5)
    tiled(decoder, hidden_states(tokens), tokens, 1.0, block_tokens=50, tile_rows=40)
    assert len(tokens.supervised) == 54 + 34
    assert sizes == [(88, 1), (50, 40), (38, 40), (50, 40), (38, 40), (50, 16), (38, 16)]


def test_bf16_stays_close_to_torch_cross_entropy(tmp_path: Path) -> None:
    decoder, _ = load_tiny(write_checkpoint(tmp_path), dtype=torch.bfloat16)
    tokens = packed_row([30, 20])
    x = hidden_states(tokens, torch.bfloat16)
    loss, gradient = tiled(decoder, x, tokens, 1.0)
    assert loss.dtype == torch.float32 and gradient.dtype == torch.bfloat16
    with torch.no_grad():
        logits = decoder.logits(decoder.norm(x))[0].float()
    torch.testing.assert_close(
        loss, F.cross_entropy(logits, tokens.labels, reduction="sum"), rtol=1e-5, atol=0
    )
    reference, reference_gradient = reference_of(decoder, x, tokens, num_supervised=1, loss_scale=1.0)
    torch.testing.assert_close(loss, reference, rtol=1e-5, atol=0)
    assert (gradient - reference_gradient).float().norm() <= 1e-2 * reference_gradient.float().norm()


def test_without_supervised_tokens_loss_and_gradient_are_zero(tmp_path: Path) -> None:
    decoder, _ = load_tiny(write_checkpoint(tmp_path))
    tokens = packed_row([1, 1, 1])
    assert len(tokens.supervised) == 0
    loss, gradient = tiled(decoder, hidden_states(tokens), tokens, 1.0)
    assert loss == 0.0 and gradient.shape == (1, 3, 64) and gradient.count_nonzero() == 0
    reference, reference_gradient = reference_of(
        decoder, hidden_states(tokens), tokens, num_supervised=5, loss_scale=1.0
    )
    assert reference == 0.0 and reference_gradient.count_nonzero() == 0
