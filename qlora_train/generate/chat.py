"""A conversation with a model: what was said so far, and the next answer.

Every answer is generated from the whole conversation, written as training would write it: a streamed model
then costs one pass over its layers for the prompt, as for a token, and what a chat template does to earlier
turns (thoughts that are left out, a system message that moves) is done anew. What no longer fits into the
context is left out, oldest exchange first; the system message stays.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from pathlib import Path

from qlora_train.errors import DataError
from qlora_train.generate.decoding import generate_tokens
from qlora_train.generate.model_folder import LoadedModel, ModelSource
from qlora_train.generate.prompts_file import Messages
from qlora_train.generate.sampling import Sampling
from qlora_train.generate.text_stream import TextStream


class StopAnswer(Exception):
    """Raised while an answer is written: it ends here, and what was written is the answer."""


class Chat:
    """A conversation. model: of `source`. system: the system message. context_tokens: of the conversation and
    an answer together. num_left_out: exchanges that the last answer did not see. was_cut: whether
    `StopAnswer` ended the last answer."""

    def __init__(
        self,
        model: LoadedModel,
        source: ModelSource,
        sampling: Sampling,
        *,
        system: str | None,
        context_tokens: int,
    ) -> None:
        self.model, self._source, self._sampling = model, source, sampling
        self.system = system
        self._room = context_tokens - sampling.max_new_tokens
        self.messages: Messages = []
        self.num_left_out = 0
        self.was_cut = False

    def ask(self, question: str, write: Callable[[str], None]) -> None:
        """Say something, and write the answer as it comes. An exception leaves the conversation as it was."""
        messages = [*self.messages, {"role": "user", "content": question}]
        answer = self._answer(messages, write)
        self.messages = [*messages, {"role": "assistant", "content": answer}]

    def retry(self, write: Callable[[str], None]) -> None:
        """Answer the last question anew, in the place of its answer."""
        question = self._last_question()
        answer = self._answer(question, write)
        self.messages = [*question, {"role": "assistant", "content": answer}]

    def base_answer(self, adapter: Path | None, write: Callable[[str], None]) -> None:
        """Write what the base alone says to the last question; the conversation keeps its own answer.
        adapter: the one in use, which is put back."""
        question = self._last_question()
        self._source.attach(self.model.decoder, None)
        try:
            self._answer(question, write)
        finally:
            self._source.attach(self.model.decoder, adapter)

    def _last_question(self) -> Messages:
        if not self.messages:
            raise DataError("Nothing has been asked yet.")
        return self.messages[:-1]

    def _answer(self, messages: Messages, write: Callable[[str], None]) -> str:
        tokens = self._encode(messages)
        stream = TextStream(self.model.tokenizer, write)
        self.was_cut = True
        with contextlib.suppress(StopAnswer):  # what there is then, is the answer
            generate_tokens(
                self.model.decoder,
                [tokens],
                self._sampling,
                self.model.stop_ids,
                lambda _, token: stream.add(token),
            )
            self.was_cut = False
        stream.finish()
        return stream.text

    def _encode(self, messages: Messages) -> list[int]:
        """Token ids of the conversation without the oldest exchanges that do not fit. Raises `DataError`
        where the last question alone does not."""
        first = [] if self.system is None else [{"role": "system", "content": self.system}]
        for num_left_out in range((len(messages) + 1) // 2):
            tokens = self._source.encode_messages([*first, *messages[2 * num_left_out :]])
            self.num_left_out = num_left_out
            if len(tokens) <= self._room:
                return tokens
        raise DataError(
            f"The question is {len(tokens)} tokens long, and there is room for {self._room} (--context, less "
            "--max-new-tokens). Shorten it, or start with a larger --context."
        )
