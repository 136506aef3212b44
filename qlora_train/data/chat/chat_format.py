"""All templates of one tokenizer: with tools and without, and what is to be said about them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from difflib import get_close_matches
from typing import TYPE_CHECKING, Any

from qlora_train.data.chat.choice import said_choice, template_for
from qlora_train.data.chat.pieces import ChatWriter, OpenThought
from qlora_train.data.chat.stops import model_stop_texts
from qlora_train.data.chat.template import ChatTemplate
from qlora_train.errors import DataError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


class ChatFormat:
    """How a tokenizer's conversations are written: with tools and without by templates of their own, where it
    has several. stop_ids: what generation_config.json says ends an answer; empty where there is none."""

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        stop_ids: Sequence[int],
        *,
        options: Mapping[str, Any] | None = None,
        open_thought: OpenThought = "close",
    ) -> None:
        """options: `data.chat_template_kwargs`. Raises DataError where the tokenizer has no template, and for
        options that none of its templates reads."""
        self._tokenizer = tokenizer
        self._has_config = bool(stop_ids)
        self._named = model_stop_texts(tokenizer, stop_ids)
        self._settings = (options, open_thought)
        self._writers: dict[str, ChatWriter] = {}
        names = [self.writer(with_tools=tools).template.names_read for tools in (False, True)]
        _check_options(options or {}, frozenset().union(*names))

    def writer(self, *, with_tools: bool) -> ChatWriter:
        source = template_for(self._tokenizer, with_tools=with_tools)
        if source not in self._writers:
            options, open_thought = self._settings
            template = ChatTemplate(source, self._tokenizer, options)
            self._writers[source] = ChatWriter(template, self._named, open_thought)
        return self._writers[source]

    @property
    def runs_templates(self) -> bool:
        """Whether any template is none of those that come with this program."""
        return not all(self.writer(with_tools=tools).template.is_built_in for tools in (False, True))

    def new_stop_texts(self) -> tuple[str, ...]:
        """Tokens that end answers and that nothing but its templates names."""
        found: list[str] = []
        for writer in (self.writer(with_tools=False), self.writer(with_tools=True)):
            if writer.stops.is_new and writer.stops.found is not None:
                found.append(writer.stops.found)
            if (token := writer.new_stop_of_calls()) is not None:
                found.append(token)
        return tuple(dict.fromkeys(found))

    def remarks(self) -> list[str]:
        """Lines for the log about the choice of the template, and about ends of answers that the model's
        files do not name."""
        lines = [line] if (line := said_choice(self._tokenizer)) else []
        lines += [
            f"answers end in {token!r}, which the chat template writes behind them and neither "
            "generation_config.json nor the tokenizer's eos_token names: generate and export stop there"
            for token in self.new_stop_texts()
        ]
        if not self._has_config:
            end = self.writer(with_tools=False).stops.found or self._tokenizer.eos_token
            lines.append(
                "the base has no generation_config.json with eos_token_id: only tokenizer and chat template "
                f"tell that answers end in {end!r}; where tool calls end otherwise, copy the original "
                "model's file into the base"
            )
        return lines


def _check_options(options: Mapping[str, Any], names_read: frozenset[str]) -> None:
    for name in options:
        if name not in names_read:
            guess = get_close_matches(name, sorted(names_read), 1)
            hint = f" (did you mean {guess[0]!r}?)" if guess else ""
            raise DataError(
                f"data.chat_template_kwargs: the chat template does not read {name!r}{hint}, so it would "
                "change nothing. Remove it."
            )
