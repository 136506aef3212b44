"""Scores of continuations against transformers' own logits of each alone."""

from __future__ import annotations

import random
from pathlib import Path

import pytest
import torch
from tiny_models import (
    HYBRID_FAMILIES,
    NF4,
    VOCABULARY_SIZE,
    library_model,
    load_tiny,
    tiny_config,
    write_checkpoint,
)

from qlora_train.generate.scoring import Continuation, _readings, score
from qlora_train.quant.formats import Quantization

ROW = 48


def continuations() -> list[Continuation]:
    """Contexts of many lengths, each with choices: of a token, beginnings of each other, and of many."""
    drawn = random.Random(1)
    found = []
    for length in (1, 5, 19, 40):
        context = [drawn.randrange(3, VOCABULARY_SIZE) for _ in range(length)]
        choices = [[drawn.randrange(3, VOCABULARY_SIZE) for _ in range(n)] for n in (1, 1, 6, 8)]
        choices += [choices[3][:n] for n in (2, 7)]
        found += [Continuation(context + choice, len(choice)) for choice in choices]
    return found


def greedy(model: torch.nn.Module, context: list[int], number: int) -> Continuation:
    """What greedy decoding says."""
    tokens = list(context)
    for _ in range(number):
        tokens.append(int(model(torch.tensor([tokens])).logits[0, -1].argmax()))
    return Continuation(tokens, number)


@pytest.mark.parametrize("family", ["llama-tied", "mistral", "lfm2", "qwen3_next"])
def test_scores_are_those_of_each_alone(tmp_path: Path, family: str) -> None:
    folder = write_checkpoint(tmp_path, family)
    is_hybrid = family in HYBRID_FAMILIES  # experts, which the library's model has as they are stored
    decoder, lora = load_tiny(folder, Quantization("none") if is_hybrid else NF4)
    decoder.head.tile_rows = 40
    model = library_model(folder, decoder, lora, torch.float32, attention="eager")
    asked = [*continuations(), greedy(model, [7, 8, 9], 4)]
    counted: list[int] = []
    found = score(decoder, asked, ROW, counted.append)
    assert len(counted) > 1 and sum(counted) == sum(of.num_scored for of in asked)
    for of, (log_likelihood, is_greedy) in zip(asked, found, strict=True):
        logits = model(torch.tensor([of.token_ids[:-1]]), use_cache=False).logits[0, -of.num_scored :]
        labels = torch.tensor(of.token_ids[-of.num_scored :])
        expected = logits.log_softmax(-1).gather(1, labels[:, None]).sum()
        assert log_likelihood == pytest.approx(float(expected), rel=2e-5)
        assert is_greedy == bool((logits.argmax(-1) == labels).all())
    assert found[-1][1] and not all(is_greedy for _, is_greedy in found)
    assert score(decoder, asked, ROW, group_size=3) == found
    assert score(decoder, [], ROW) == []


def test_what_is_the_same_is_read_once() -> None:
    asked = continuations()
    readings = _readings(asked, ROW)
    # Of each context: what the choice of 6 reads, and what that of 8 does, with all that begins so.
    assert sorted(len(of.token_ids) for of in readings) == sorted(
        n + k for n in (1, 5, 19, 40) for k in (5, 7)
    )
    assert sorted(i for of in readings for i in set(of.owners)) == list(range(len(asked)))
    assert max(len(of.labels) for of in _readings([Continuation([5, t], 1) for t in range(90)], ROW)) == ROW


def test_rows_are_of_one_rotary_table(tmp_path: Path) -> None:
    factors = [1.0 + i / 4 for i in range(8)]
    rope = {
        "rope_type": "longrope",
        "rope_theta": 10000.0,
        "short_factor": factors,
        "long_factor": factors[::-1],
        "original_max_position_embeddings": 16,
        "factor": 4.0,
    }
    folder = write_checkpoint(tmp_path, "llama", rope_parameters=rope, max_position_embeddings=64)
    assert tiny_config("llama", rope_parameters=rope).rope_parameters["rope_type"] == "longrope"
    decoder, _ = load_tiny(folder)
    together = score(decoder, continuations(), 64)
    for of, expected in zip(continuations(), together, strict=True):
        [alone] = score(decoder, [of], 64)
        assert alone[0] == pytest.approx(expected[0], rel=1e-5)
