"""Cross-entropy at the end of the walk: the loss of one micro-batch and the gradient it sends back.

    loss = 1/N sum over supervised t of ( logsumexp(z_t) - z_t[label_t] ),   z = head(norm(x))

N counts the supervised tokens of the whole optimizer step, over all micro-batches and ranks, so any split of
the same data has the same loss and gradients. (A mean per micro-batch, averaged, weighs tokens by how the
data happened to be split.)

`chunked_loss` gathers the S supervised hidden states and takes logits, loss and gradient a chunk of C at a
time, gradient in the forward pass: at most about 3 * 4 C V bytes of logits alive instead of 10 T V. With V =
128,256 and T = 2,048 that is 0.4 GB instead of 2.6 GB. Head and norm are frozen, so only dL/dx [T, D]
survives. `reference_loss` is the formula on all T positions as transformers computes it; bit-identical to
autograd through the model.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from qlora_train.model.decoder import FrozenDecoder
from qlora_train.model.packed_tokens import PackedTokens

CHUNK_LOGITS_BYTES = 128 * 2**20  # of fp32 logits in one chunk
IGNORED = -100


def chunk_size(vocabulary_size: int) -> int:
    """How many tokens' fp32 logits fit in a chunk."""
    return max(16, CHUNK_LOGITS_BYTES // (4 * vocabulary_size))


def chunked_loss(
    decoder: FrozenDecoder, x: Tensor, tokens: PackedTokens, gradient_scale: float | None
) -> tuple[Tensor, Tensor | None]:
    """Sum of the supervised losses (fp32 scalar), and its gradient times `gradient_scale` (None: no
    gradient).

    x [1, T, D]: output of the last layer. Returns (loss sum, dL/dx [1, T, D] or None).
    """
    leaf = x.detach().requires_grad_(gradient_scale is not None)
    with torch.set_grad_enabled(gradient_scale is not None):
        hidden = decoder.norm(leaf)[0]
    chosen = hidden.detach()[tokens.supervised]
    labels = tokens.labels[tokens.supervised]
    loss_sum = torch.zeros((), dtype=torch.float32, device=x.device)
    chosen_gradient = torch.empty_like(chosen) if gradient_scale is not None else None
    size = chunk_size(decoder.config.vocab_size)
    for start in range(0, chosen.shape[0], size):
        chunk = chosen[start : start + size].requires_grad_(gradient_scale is not None)
        with torch.set_grad_enabled(gradient_scale is not None):
            logits = decoder.logits(chunk[None])[0].float()
            loss = F.cross_entropy(logits, labels[start : start + size], reduction="sum")
        loss_sum += loss.detach()
        if gradient_scale is not None and chosen_gradient is not None:
            (gradient,) = torch.autograd.grad(loss * gradient_scale, chunk)
            chosen_gradient[start : start + size] = gradient
    if chosen_gradient is None:
        return loss_sum, None
    hidden_gradient = torch.zeros_like(hidden)
    hidden_gradient[tokens.supervised] = chosen_gradient
    hidden.backward(hidden_gradient)
    return loss_sum, leaf.grad


def reference_loss(
    decoder: FrozenDecoder, x: Tensor, tokens: PackedTokens, num_supervised: int, loss_scale: float
) -> tuple[Tensor, Tensor]:
    """The same by library operations over all positions: (loss sum, dL/dx), dL times loss_scale /
    num_supervised."""
    leaf = x.detach().requires_grad_()
    with torch.enable_grad():
        logits = decoder.logits(decoder.norm(leaf))[0].float()
        loss_sum = F.cross_entropy(logits, tokens.labels, ignore_index=IGNORED, reduction="sum")
        loss = loss_sum / num_supervised
        (loss * loss_scale if loss_scale != 1.0 else loss).backward()
    assert leaf.grad is not None
    return loss_sum.detach(), leaf.grad
