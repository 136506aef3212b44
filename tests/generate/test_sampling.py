"""The choice of tokens against transformers' own logits processors."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from transformers import LogitsProcessorList
from transformers.generation import (
    MinPLogitsWarper,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from qlora_train.generate.sampling import Sampling, choose

VOCABULARY = 40
SEQUENCES = [[3, 3, 9, 20], [7]]


def logits() -> Tensor:
    return 3 * torch.randn(2, VOCABULARY, generator=torch.Generator().manual_seed(1))


def library_probabilities(sampling: Sampling) -> Tensor:
    """The distribution that transformers samples from."""
    rows = []
    for row, sequence in zip(logits(), SEQUENCES, strict=True):
        warpers = LogitsProcessorList([RepetitionPenaltyLogitsProcessor(sampling.repetition_penalty)])
        warpers.append(TemperatureLogitsWarper(sampling.temperature))
        if sampling.top_k:
            warpers.append(TopKLogitsWarper(sampling.top_k))
        warpers.append(TopPLogitsWarper(sampling.top_p))
        if sampling.min_p:
            warpers.append(MinPLogitsWarper(sampling.min_p))
        rows.append(torch.softmax(warpers(torch.tensor([sequence]), row[None]), dim=-1)[0])
    return torch.stack(rows)


@pytest.mark.parametrize(
    "sampling",
    [
        Sampling(1, 0.7),
        Sampling(1, 1.5, top_p=0.8),
        Sampling(1, 1.0, top_k=5),
        Sampling(1, 1.3, top_k=12, top_p=0.7, min_p=0.05),
        Sampling(1, 2.0, min_p=0.1, repetition_penalty=1.8),
        Sampling(1, 0.9, top_k=1000),
    ],
)
def test_tokens_come_as_often_as_transformers_says(sampling: Sampling) -> None:
    expected, num_draws = library_probabilities(sampling), 4000
    counts = torch.zeros_like(expected)
    generators = [torch.Generator().manual_seed(seed) for seed in (5, 6)]
    for _ in range(num_draws):
        for row, token in enumerate(choose(logits(), sampling, generators, SEQUENCES)):
            counts[row, token] += 1
    assert not counts[expected == 0].any()
    error = (counts / num_draws - expected).abs()
    assert (error <= 5 * (expected * (1 - expected) / num_draws).sqrt() + 2 / num_draws).all()


def test_a_penalty_changes_the_greedy_choice_too() -> None:
    generators = [torch.Generator() for _ in SEQUENCES]
    best = choose(logits(), Sampling(1), generators, SEQUENCES)
    sequences = [[token] for token in best]
    penalised = choose(logits(), Sampling(1, repetition_penalty=1e9), generators, sequences)
    second = logits().topk(2, dim=-1).indices[:, 1].tolist()
    assert penalised == second
