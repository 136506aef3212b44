"""Generates tokens: one prefill of all prompts, packed into a row, then a decoding step per token for all.

Each step is the same walk over the layers as in training, with a key-value cache: one pass over the layers
per token, whatever the number of prompts. generate/sampling.py chooses the tokens.

Each prompt has a random generator of its own, seeded by numpy's `SeedSequence` from the seed and the
prompt's number: neither the batch nor another prompt changes it, and no two pairs share one (with
seed + number, seed 1 would repeat nearly all samples of seed 0).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import torch
from torch import Tensor

from qlora_train.generate.kv_cache import KeyValueCache
from qlora_train.generate.sampling import Sampling, choose
from qlora_train.model.attention import DocumentLayout
from qlora_train.model.decoder import FrozenDecoder
from qlora_train.model.rope_lengths import batches_by_table
from qlora_train.model.vocab_matrix import TokenIds


@torch.no_grad()
def generate_tokens(
    decoder: FrozenDecoder,
    prompts: Sequence[Sequence[int]],
    sampling: Sampling,
    stop_ids: frozenset[int],
    on_token: Callable[[int, int], None] | None = None,
    numbers: Sequence[int] | None = None,
    is_complete: Callable[[Sequence[int]], bool] | None = None,
) -> list[list[int]]:
    """Continue each prompt (token ids, at least one) until a stop token, until its answer is_complete, or
    until `max_new_tokens`.

    on_token(prompt index, token id) is called for each new token except stop tokens. numbers: of the prompts
    among all of a command's, for their seeds; None: their indices. Returns the new tokens of each prompt,
    without the stop token. Where the rotary table depends on the longest sequence
    (model/rope_lengths.py), prompts run in one batch per table; raises `UnsupportedModelError` for a prompt
    whose table would change while it is continued.
    """
    answers: list[list[int]] = [[] for _ in prompts]
    numbers = range(len(prompts)) if numbers is None else numbers
    for members in batches_by_table(decoder.config, [len(p) for p in prompts], sampling.max_new_tokens):

        def tell(b: int, token: int, members: Sequence[int] = members) -> None:
            if on_token is not None:
                on_token(members[b], token)

        chosen, seeds = [prompts[b] for b in members], [numbers[b] for b in members]
        found = _generate(chosen, seeds, decoder, sampling, stop_ids, tell, is_complete)
        for b, answer in zip(members, found, strict=True):
            answers[b] = answer
    return answers


def _generate(
    prompts: Sequence[Sequence[int]],
    numbers: Sequence[int],
    decoder: FrozenDecoder,
    sampling: Sampling,
    stop_ids: frozenset[int],
    on_token: Callable[[int, int], None],
    is_complete: Callable[[Sequence[int]], bool] | None,
) -> list[list[int]]:
    """Continue the prompts of one batch. numbers: their indices among all prompts, for their seeds."""
    answers: list[list[int]] = [[] for _ in prompts]
    generators = [_generator(sampling.seed, b) for b in numbers]
    sequences = [list(prompt) for prompt in prompts]
    running = set(range(len(prompts)))
    lengths = [len(prompt) for prompt in prompts]
    boundaries = np.cumsum([0, *lengths])
    cache = KeyValueCache(
        tuple(int(b) for b in boundaries),
        max(lengths) + sampling.max_new_tokens,
        decoder.device.torch,
        decoder.config,
    )
    logits = _prefill(decoder, prompts, boundaries, cache)
    for num_done in range(1, sampling.max_new_tokens + 1):
        chosen = choose(logits, sampling, generators, sequences)
        for b in sorted(running):
            if chosen[b] in stop_ids:
                running.remove(b)
            else:
                answers[b].append(chosen[b])
                sequences[b].append(chosen[b])
                on_token(b, chosen[b])
                if is_complete is not None and is_complete(answers[b]):
                    running.remove(b)
        if not running or num_done == sampling.max_new_tokens:
            break
        logits = _decode(decoder, chosen, cache)
    return answers


def _generator(seed: int, number: int) -> torch.Generator:
    """The random generator of a prompt. number: its index among all prompts."""
    mixed = np.random.SeedSequence(seed, spawn_key=(number,)).generate_state(1, np.uint64)
    return torch.Generator().manual_seed(int(mixed[0]))


def _prefill(
    decoder: FrozenDecoder, prompts: Sequence[Sequence[int]], boundaries: np.ndarray, cache: KeyValueCache
) -> Tensor:
    """Logits [B, V] after each prompt's last token."""
    device = decoder.device.torch
    ids = TokenIds.of(np.concatenate([np.asarray(prompt) for prompt in prompts]), device)
    position_ids = torch.cat([torch.arange(len(prompt), device=device) for prompt in prompts])
    documents = DocumentLayout.of(boundaries, device)
    x, arguments = decoder.embed(ids, position_ids[None], documents=documents)
    for i in decoder.layers_in_turn():
        x = decoder.run_layer(i, x, arguments[i] | {"past_key_values": cache})
    last = torch.from_numpy(boundaries[1:] - 1).to(device)
    return decoder.logits(decoder.norm(x[:, last]))[0].float()


def _decode(decoder: FrozenDecoder, tokens: Sequence[int], cache: KeyValueCache) -> Tensor:
    """Logits [B, V] after one more token per sequence."""
    ids = TokenIds.of(np.asarray(tokens), decoder.device.torch)
    x, arguments = decoder.embed(ids, cache.lengths[:, None], kv_lengths=cache.lengths + 1)
    for i in decoder.layers_in_turn():
        x = decoder.run_layer(i, x, arguments[i] | {"past_key_values": cache})
    cache.advance()
    return decoder.logits(decoder.norm(x))[:, 0].float()
