"""`qlora-train generate`: prints the answers to prompts, a single one as it is generated."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

from qlora_train.errors import UserError
from qlora_train.generate.decoding import generate_tokens
from qlora_train.generate.model_folder import LoadedModel, ModelSource, find_model
from qlora_train.generate.prompts_file import Messages
from qlora_train.generate.sampling import Sampling
from qlora_train.generate.text_stream import TextStream
from qlora_train.plan.planned_walk import GenerateSize
from qlora_train.terminal_text import show, tell


def generate_command(
    target: Path | str,
    prompts: Sequence[str | Messages],
    sampling: Sampling,
    *,
    system: str | None = None,
    raw: bool = False,
    batch_size: int = 16,
    as_json: bool = False,
    checkpoint: str | None = None,
    vram_bytes: int | None = None,
) -> None:
    """Print the answer to each prompt, a text or a conversation. system: a system message before texts. raw:
    give the prompt to the model as it is, without template or chat turns. batch_size: prompts that run
    together. as_json: a line {"prompt", "answer"} each. checkpoint: see `find_adapter`. vram_bytes: budget on
    the device; None: the run's, or what is free.

    A single prompt streams. Notes, such as which weights stream, go to stderr.
    """
    with _loaded(
        target,
        prompts,
        sampling,
        system=system,
        raw=raw,
        batch_size=batch_size,
        checkpoint=checkpoint,
        vram_bytes=vram_bytes,
    ) as (model, encoded):
        if len(prompts) == 1 and not as_json:
            _stream(model, encoded, sampling)
            return
        for prompt, answer in zip(prompts, model.answers(encoded, sampling, batch_size), strict=True):
            _print_answer(prompt, answer, as_json=as_json)


def answer_prompts(
    target: Path | str,
    prompts: Sequence[str | Messages],
    sampling: Sampling,
    *,
    batch_size: int,
    **options: Any,
) -> list[str]:
    """The answers to prompts, as text; arguments as of `generate_command`."""
    with _loaded(target, prompts, sampling, batch_size=batch_size, **options) as (model, encoded):
        return list(model.answers(encoded, sampling, batch_size))


@contextmanager
def _loaded(
    target: Path | str,
    prompts: Sequence[str | Messages],
    sampling: Sampling,
    *,
    system: str | None,
    raw: bool,
    batch_size: int,
    checkpoint: str | None,
    vram_bytes: int | None,
) -> Iterator[tuple[LoadedModel, list[list[int]]]]:
    """Context with the model, and the token ids of the prompts."""
    if raw and (system is not None or not all(isinstance(prompt, str) for prompt in prompts)):
        raise UserError(
            "--raw gives texts to the model as they are: it goes with no system message and no conversation"
        )
    log = partial(tell, stream=sys.stderr)
    source = find_model(target, checkpoint=checkpoint, log=log)
    encoded = [_encoded(source, prompt, system=system, raw=raw) for prompt in prompts]
    lengths = sorted(map(len, encoded), reverse=True)
    size = GenerateSize(tuple(lengths[:batch_size]), sampling.max_new_tokens)
    model = source.load(size, vram_bytes=vram_bytes, log=log)
    try:
        yield model, encoded
    finally:
        model.decoder.close()


def _encoded(source: ModelSource, prompt: str | Messages, *, system: str | None, raw: bool) -> list[int]:
    if isinstance(prompt, str):
        return source.encode(prompt, system=system, raw=raw)
    first = [] if system is None else [{"role": "system", "content": system}]
    return source.encode_messages([*first, *prompt])


def _stream(model: LoadedModel, encoded: list[list[int]], sampling: Sampling) -> None:
    stream = TextStream(model.tokenizer, show)
    generate_tokens(model.decoder, encoded, sampling, model.stop_ids, lambda _, token: stream.add(token))
    stream.finish()
    print()


def _print_answer(prompt: str | Messages, answer: str, *, as_json: bool) -> None:
    if as_json:
        key = "prompt" if isinstance(prompt, str) else "messages"
        print(json.dumps({key: prompt, "answer": answer}, ensure_ascii=False), flush=True)
    else:
        question = prompt if isinstance(prompt, str) else prompt[-1]["content"]
        show(f"> {question}\n{answer}\n\n")
