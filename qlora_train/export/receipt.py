"""The receipt of an export: measures how far the written model is from the trained one.

On held-out supervised tokens t, with p the distribution of base + adapter as trained and q that of another
model:

    KL      mean over t of  sum_v p_v (log p_v - log q_v)         0 where they are the same model
    loss    mean of -log q(label), and its difference to -log p(label)
    top-1   share of t where both have the same most likely token

Logits z are computed a tile of the vocabulary at a time, as in model/loss.py: per token and model a running
maximum m and sum s of exp(z - m), and for p a running sum w of exp(z_p - m_p) (z_p - z_q). With
lse = m + log s, KL = w / s_p - lse_p + lse_q. Memory: two tiles of logits for a block of tokens.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from torch import Tensor

from qlora_train.export.walked_model import HeldOut, LargestValue, WalkedModel

BLOCK_TOKENS = 512
RECEIPT_FILE = "receipt.json"


@dataclass(frozen=True)
class Figures:
    """The figures of one model compared with the trained one. kl in nats; top1 is a share."""

    model: str
    loss: float
    loss_difference: float
    kl: float
    top1: float

    @property
    def is_finite(self) -> bool:
        return all(math.isfinite(value) for value in (self.loss, self.kl))


@dataclass(frozen=True)
class Receipt:
    """The figures of an export. source: where the tokens are from. trained_loss: of base + adapter as
    trained. largest: value in its forward pass, and where. remark: what they advise."""

    source: str
    num_tokens: int
    trained_loss: float
    largest: LargestValue
    figures: tuple[Figures, ...]
    remark: str | None

    def write(self, folder: Path, log: Callable[[str], None]) -> None:
        """Write the receipt into an export's folder, and its lines to the log."""
        for line in self.lines():
            log(line)
        (folder / RECEIPT_FILE).write_text(json.dumps(asdict(self), indent=1) + "\n", "utf-8")

    def lines(self) -> Iterator[str]:
        """The receipt as lines of a table."""
        yield f"receipt on {self.num_tokens:,} supervised tokens {self.source}:"
        width = max(len(name) for name in ("base + adapter as trained", *(f.model for f in self.figures)))
        yield f"  {'':{width}}      loss  difference       KL  top-1 agreement"
        yield f"  {'base + adapter as trained':{width}}  {self.trained_loss:8.4f}"
        for f in self.figures:
            yield (
                f"  {f.model:{width}}  {f.loss:8.4f}  {f.loss_difference:+10.4f}  {f.kl:7.1e}  {f.top1:14.1%}"
            )
        if self.remark is not None:
            yield self.remark


@dataclass
class _Sums:
    """Running sums over the vocabulary of one model, [S] each: maximum, sum of exponentials, the label's
    logit (fp32), and the most likely token (int64)."""

    largest: Tensor
    total: Tensor
    label: Tensor
    best: Tensor

    @staticmethod
    def empty(num_tokens: int, device: torch.device) -> _Sums:
        zeros = torch.zeros(num_tokens, device=device)
        return _Sums(
            torch.full_like(zeros, -torch.inf), zeros.clone(), zeros.clone(), torch.zeros_like(zeros).long()
        )

    def add(self, block: slice, logits: Tensor, start: int, labels: Tensor) -> Tensor:
        """Add a tile of logits [n, rows] that begins at row `start`; returns the factors [n] that earlier
        sums are rescaled by."""
        value, place = logits.max(dim=-1)
        before = self.largest[block]
        new = torch.maximum(before, value)
        rescale = torch.where(before.isneginf(), 0.0, (before - new).exp())
        self.best[block] = torch.where(value > before, place + start, self.best[block])
        self.total[block] = self.total[block] * rescale + (logits - new[:, None]).exp().sum(-1)
        self.largest[block] = new
        here = (labels >= start) & (labels < start + logits.shape[1])
        picked = logits.gather(1, (labels - start).clamp(0, logits.shape[1] - 1)[:, None])[:, 0]
        self.label[block] = torch.where(here, picked, self.label[block])
        return rescale

    @property
    def log_sum(self) -> Tensor:
        return self.largest + self.total.log()

    @property
    def loss(self) -> float:
        return float((self.log_sum - self.label).double().mean())


@torch.no_grad()
def compare(trained: WalkedModel, other: WalkedModel, documents: HeldOut, name: str) -> tuple[float, Figures]:
    """(loss of the trained model, figures of the other one), computed tile by tile."""
    device, num_tokens = trained.hidden.device, len(trained.hidden)
    labels = torch.from_numpy(documents.all_labels).to(device)
    p, q = _Sums.empty(num_tokens, device), _Sums.empty(num_tokens, device)
    weighted = torch.zeros(num_tokens, device=device)
    for (start, rows_p), (_, rows_q) in zip(trained.head_tiles(), other.head_tiles(), strict=True):
        for first in range(0, num_tokens, BLOCK_TOKENS):
            block = slice(first, min(first + BLOCK_TOKENS, num_tokens))
            z_p, z_q = (
                model.decoder.tile_logits(model.hidden[None, block], start, rows)[0].float()
                for model, rows in ((trained, rows_p), (other, rows_q))
            )
            rescale = p.add(block, z_p, start, labels[block])
            q.add(block, z_q, start, labels[block])
            shares = (z_p - p.largest[block, None]).exp()
            weighted[block] = weighted[block] * rescale + (shares * (z_p - z_q)).sum(-1)
    kl = (weighted / p.total - p.log_sum + q.log_sum).double().mean()
    agreement = (p.best == q.best).double().mean()
    return p.loss, Figures(name, q.loss, q.loss - p.loss, float(kl.clamp_min(0.0)), float(agreement))
