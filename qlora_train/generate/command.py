"""`qlora-train generate`: prints the answers to prompts, a single one as it is generated."""

from __future__ import annotations

import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path

from transformers import PreTrainedTokenizerBase

from qlora_train.generate.decoding import Sampling, generate_tokens
from qlora_train.generate.model_folder import LoadedModel, find_model
from qlora_train.plan.planned_walk import GenerateSize

_UNFINISHED = "\ufffd"  # decoding of an incomplete multi-byte character


def generate_command(
    target: Path | str,
    prompts: list[str],
    *,
    max_new_tokens: int,
    temperature: float,
    top_p: float,
    seed: int,
    raw: bool,
    checkpoint: str | None = None,
    vram_bytes: int | None,
) -> None:
    """Print the answer to each prompt. raw: give the prompt to the model as it is, without template or chat
    turns. checkpoint: see `find_adapter`. vram_bytes: budget on the device; None: the run's, or what is free.

    One prompt streams; several run in one batch and are printed in order. Notes, such as which weights
    stream, go to stderr.
    """
    log = partial(print, file=sys.stderr)
    source = find_model(target, checkpoint=checkpoint, log=log)
    encoded = [source.encode(prompt, raw=raw) for prompt in prompts]
    size = GenerateSize(tuple(len(tokens) for tokens in encoded), max_new_tokens)
    model = source.load(size, vram_bytes=vram_bytes, log=log)
    sampling = Sampling(max_new_tokens, temperature, top_p, seed)
    try:
        _answer(model, prompts, encoded, sampling)
    finally:
        model.decoder.close()


def _answer(model: LoadedModel, prompts: list[str], encoded: list[list[int]], sampling: Sampling) -> None:
    if len(prompts) == 1:
        stream = TextStream(model.tokenizer, lambda text: print(text, end="", flush=True))
        generate_tokens(model.decoder, encoded, sampling, model.stop_ids, lambda _, token: stream.add(token))
        stream.finish()
        print()
        return
    answers = generate_tokens(model.decoder, encoded, sampling, model.stop_ids)
    for prompt, tokens in zip(prompts, answers, strict=True):
        sys.stdout.write(f"> {prompt}\n{model.tokenizer.decode(tokens, skip_special_tokens=True)}\n\n")


class TextStream:
    """Writes text as tokens come. A character may span tokens, so the whole answer is decoded again for each
    token, and only its new, complete characters are written.

    transformers' TextStreamer restarts after a newline, where SentencePiece tokenizers lose a space of
    indentation; tokenizers' DecodeStream raises at bytes that are no character."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, write: Callable[[str], None]) -> None:
        self._tokenizer, self._write = tokenizer, write
        self._tokens: list[int] = []
        self._num_written = 0

    def add(self, token: int) -> None:
        """Write the characters that this token completes."""
        self._tokens.append(token)
        text = self._text()
        if not text.endswith(_UNFINISHED):
            self._write(text[self._num_written :])
            self._num_written = len(text)

    def finish(self) -> None:
        """Write the remaining text, complete or not."""
        self._write(self._text()[self._num_written :])

    def _text(self) -> str:
        return str(self._tokenizer.decode(self._tokens, skip_special_tokens=True))
