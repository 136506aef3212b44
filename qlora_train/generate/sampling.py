"""Chooses the next token of every sequence from its logits.

In the order that transformers has: a repetition penalty on tokens that the sequence holds already (Keskar et
al. 2019, arXiv:1909.05858), division by the temperature, the top_k likeliest tokens, the smallest set of them
whose probability reaches top_p (nucleus sampling, Holtzman et al. 2020, arXiv:1904.09751), and of those the
ones with at least min_p times the probability of the likeliest (Nguyen et al. 2024, arXiv:2407.01082). Tokens
are drawn on the CPU with one generator per prompt, so a prompt's random numbers do not depend on the others.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Sampling:
    """Settings of decoding. temperature: 0 is greedy. top_p: in (0, 1]. top_k: 0 is all. min_p: in [0, 1).
    repetition_penalty: above 1 makes tokens of the prompt and of the answer less likely. seed: of
    the command; each prompt's generator is seeded from it and the prompt's number (decoding.py)."""

    max_new_tokens: int
    temperature: float = 0.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    seed: int = 0


def choose(
    logits: Tensor,
    sampling: Sampling,
    generators: Sequence[torch.Generator],
    sequences: Sequence[Sequence[int]],
) -> list[int]:
    """The next token of each sequence, from logits [B, V], fp32. sequences: the tokens so far."""
    if sampling.repetition_penalty != 1.0:
        logits = _penalised(logits, sequences, sampling.repetition_penalty)
    if sampling.temperature == 0:
        return logits.argmax(dim=-1).tolist()
    below_best = logits - logits.amax(dim=-1, keepdim=True)  # divided by a tiny temperature: 0 or -inf
    probabilities = torch.softmax(below_best / sampling.temperature, dim=-1).cpu()
    ordered, order = probabilities.sort(dim=-1, descending=True)
    if sampling.top_k:
        ordered[:, sampling.top_k :] = 0.0
        ordered /= ordered.sum(dim=-1, keepdim=True)
    before = ordered.cumsum(dim=-1) - ordered
    is_out = (before >= sampling.top_p) | (ordered < sampling.min_p * ordered[:, :1])
    ordered = ordered.masked_fill(is_out, 0.0)
    picks = [torch.multinomial(row, 1, generator=g) for row, g in zip(ordered, generators, strict=True)]
    return [int(order[b, pick]) for b, pick in enumerate(picks)]


def _penalised(logits: Tensor, sequences: Sequence[Sequence[int]], penalty: float) -> Tensor:
    """Logits where those of a sequence's own tokens are divided by the penalty, or multiplied if below 0."""
    logits = logits.clone()
    for row, tokens in zip(logits, sequences, strict=True):
        ids = torch.tensor(sorted(set(tokens)), device=logits.device)
        row[ids] = torch.where(row[ids] > 0, row[ids] / penalty, row[ids] * penalty)
    return logits
