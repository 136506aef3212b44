"""Generation against transformers' own `generate`, prompts of different lengths in one batch."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from tiny_models import HYBRID_FAMILIES, NF4, VOCABULARY_SIZE, library_model, load_tiny, write_checkpoint

from qlora_train.generate.decoding import generate_tokens
from qlora_train.generate.sampling import Sampling
from qlora_train.quant.formats import Quantization

NUM_NEW = 12


def prompts(seed: int = 0) -> list[list[int]]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(3, VOCABULARY_SIZE, (n,), generator=generator).tolist() for n in (5, 27, 1, 14)]


PLAIN_FAMILIES = ("llama-tied", "mistral", "qwen3", "phi3", "gemma", "gemma2", "granite")


@pytest.mark.parametrize("family", [*PLAIN_FAMILIES, *HYBRID_FAMILIES])
def test_greedy_equals_transformers(tmp_path: Path, family: str) -> None:
    changes = {"sliding_window": 8, "head_dim": 16} if family == "gemma2" else {}
    folder = write_checkpoint(tmp_path, family, **changes)
    with_experts = family in HYBRID_FAMILIES  # whose weights the library's model has as they are stored
    decoder, lora = load_tiny(folder, Quantization("none") if with_experts else NF4)
    model = library_model(folder, decoder, lora, torch.float32, attention="eager")
    answers = generate_tokens(decoder, prompts(), Sampling(NUM_NEW), frozenset())
    for prompt, answer in zip(prompts(), answers, strict=True):
        output = model.generate(
            torch.tensor([prompt]),
            attention_mask=torch.ones(1, len(prompt), dtype=torch.long),
            max_new_tokens=NUM_NEW,
            do_sample=False,
            eos_token_id=None,
            pad_token_id=0,
        )
        assert answer == output[0, len(prompt) :].tolist()


def test_a_prompt_does_not_see_its_neighbours(tmp_path: Path) -> None:
    decoder, _ = load_tiny(write_checkpoint(tmp_path))
    together = generate_tokens(decoder, prompts(), Sampling(NUM_NEW), frozenset())
    alone = [generate_tokens(decoder, [p], Sampling(NUM_NEW), frozenset())[0] for p in prompts()]
    assert together == alone


def test_stops_at_a_stop_token_which_is_not_part_of_the_answer(tmp_path: Path) -> None:
    decoder, _ = load_tiny(write_checkpoint(tmp_path))
    free = generate_tokens(decoder, prompts(), Sampling(NUM_NEW), frozenset())
    stop = free[1][4]
    seen: list[tuple[int, int]] = []
    answers = generate_tokens(
        decoder, prompts(), Sampling(NUM_NEW), frozenset({stop}), lambda b, t: seen.append((b, t))
    )
    for whole, answer in zip(free, answers, strict=True):
        assert answer == (whole[: whole.index(stop)] if stop in whole else whole)
    assert [t for b, t in seen if b == 1] == answers[1]


def test_an_answer_ends_with_the_token_that_completes_it(tmp_path: Path) -> None:
    decoder, _ = load_tiny(write_checkpoint(tmp_path))
    free = generate_tokens(decoder, prompts(), Sampling(NUM_NEW), frozenset())
    pair = free[1][3:5]
    asked: list[int] = []

    def is_complete(answer: Sequence[int]) -> bool:
        asked.append(len(answer))
        return list(answer[-2:]) == pair

    answers = generate_tokens(decoder, prompts(), Sampling(NUM_NEW), frozenset(), is_complete=is_complete)
    for whole, answer in zip(free, answers, strict=True):
        stop = next((n for n in range(2, NUM_NEW) if whole[n - 2 : n] == pair), NUM_NEW)
        assert answer == whole[:stop]
    assert len(answers[1]) <= 5 and len(asked) == sum(map(len, answers))


def test_sampling_follows_seed_temperature_and_top_p(tmp_path: Path) -> None:
    decoder, _ = load_tiny(write_checkpoint(tmp_path))

    def sample(seed: int, temperature: float = 2.0, top_p: float = 1.0) -> list[list[int]]:
        sampling = Sampling(NUM_NEW, temperature, top_p, seed=seed)
        return generate_tokens(decoder, prompts(), sampling, frozenset())

    greedy = generate_tokens(decoder, prompts(), Sampling(NUM_NEW), frozenset())
    assert sample(1) == sample(1)
    assert sample(1) != sample(2)
    assert sample(1) != greedy
    assert sample(1, top_p=1e-6) == greedy  # the nucleus is the likeliest token alone
    assert sample(1, temperature=1e-4) == greedy
    assert sample(1, temperature=1e-37) == greedy  # logits divided by it are infinite


def test_samples_of_one_prompt_repeat_neither_each_other_nor_those_of_other_seeds(tmp_path: Path) -> None:
    decoder, _ = load_tiny(write_checkpoint(tmp_path))
    same = [prompts()[0]] * 4
    samples = [
        tuple(answer)
        for seed in (0, 1, 2, 2**32)
        for answer in generate_tokens(decoder, same, Sampling(NUM_NEW, 2.0, seed=seed), frozenset())
    ]
    assert len(set(samples)) == len(samples)
    alone = generate_tokens(decoder, same[:1], Sampling(NUM_NEW, 2.0, seed=1), frozenset(), numbers=[3])
    assert tuple(alone[0]) == samples[4 + 3]
