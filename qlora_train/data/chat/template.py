"""One chat template as a function: messages -> text, in transformers' sandbox, the same text every day.

A template is a program that came with a checkpoint. It is run by `render_jinja_template`, the library's own
immutable sandbox, and sees plain data only. What it may look at besides the messages is fixed here: the
tokenizer's named special tokens, `data.chat_template_kwargs`, and a day that does not pass (a template that
prints today's date would make a resumed run see other tokens than the one it continues).

`literals` are the texts that stand in the template's source. They are never trusted to mean anything; they
are what probes (see `thoughts`) try out, so that nothing has to be known by name.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from datetime import datetime
from functools import cached_property
from typing import TYPE_CHECKING, Any

from qlora_train.data.tables import ExampleProblem
from qlora_train.errors import DataError

if TYPE_CHECKING:
    from jinja2 import nodes
    from transformers import PreTrainedTokenizerBase

Message = dict[str, Any]
Messages = Sequence[Message]
Tools = Sequence[Mapping[str, Any]]
Span = tuple[int, int]

_GENERATION_TAG = re.compile(r"\{%[-+]?\s*(?:end)?generation\s*[-+]?%\}")
_FIXED_DAY = datetime(2024, 7, 26)
_FIXED_DATE = _FIXED_DAY.strftime("%d %b %Y")
_DATE_CODES = [f"%{code}" for code in "aAbBcCdDeFGgHhIjklmMnpPrRStTuUVwWxXyYzZ"] + [
    f"%-{code}" for code in "deHIjklmMSUVWy"
]
# What a template's own expressions raise: adding text to an object, an index too far, int('x').
_RAISED_BY_EXPRESSIONS = (
    TypeError, ValueError, LookupError, ArithmeticError, AttributeError, RecursionError
)  # fmt: skip
_HANDED_OVER = frozenset({"messages", "tools", "documents", "add_generation_prompt", "chat_template"})
# `<think>`, `[INST]`, `(note)`: what a template may use like a control token, unknown to the tokenizer.
_TAG = r"</?[A-Za-z_][^<>\s]{0,60}>|\[/?[A-Za-z_][^\[\]\s]{0,60}\]|\(/?[A-Za-z_][^()\s]{0,60}\)"


class ChatProblem(ExampleProblem):
    """A conversation that the template refuses or hides."""


class ChatTemplate:
    """A template's source with everything a tokenizer hands to it. `control_tokens` matches the tokenizer's
    special tokens.
    """

    def __init__(
        self, source: str, tokenizer: PreTrainedTokenizerBase, options: Mapping[str, Any] | None = None
    ) -> None:
        """options: `data.chat_template_kwargs`. Raises DataError for a template that is none."""
        from jinja2 import meta

        self.source = source  # `names_read`: variables that it looks up, but those that examples fill
        self._source_with_fixed_day = _with_fixed_day(source)
        self.names_read = frozenset(meta.find_undeclared_variables(self._tree)) - _HANDED_OVER
        self._variables = {"date_string": _FIXED_DATE, **tokenizer.special_tokens_map, **(options or {})}
        added = tokenizer.added_tokens_decoder
        special = {str(token.content) for token in added.values() if token.special}
        special |= set(tokenizer.all_special_tokens)
        self.control_tokens = _any_of(special)
        self._edges = re.compile(
            "|".join([_any_of(special | {str(token.content) for token in added.values()}).pattern, _TAG])
        )

    def render(self, messages: Messages, tools: Tools = (), *, prompt: bool = False) -> str:
        """The text of the messages; `prompt`: with what asks for an answer behind it. Raises ChatProblem with
        the template's own complaint.
        """
        return self._render(messages, tools, prompt=prompt)[0]

    def render_marked(self, messages: Messages, tools: Tools = ()) -> tuple[str, list[Span]]:
        """The text, and the characters inside the template's `{% generation %}` blocks, in order."""
        return self._render(messages, tools, marks=True)

    @cached_property
    def has_marks(self) -> bool:
        return _GENERATION_TAG.search(self.source) is not None

    @cached_property
    def literals(self) -> tuple[str, ...]:
        """Texts in the source's expressions, without the ones of one or two characters, shortest first."""
        from jinja2 import nodes

        values = {node.value for node in self._tree.find_all(nodes.Const) if isinstance(node.value, str)}
        return tuple(sorted((v for v in values if len(v.strip()) > 2), key=lambda v: (len(v), v)))

    def at_edge(self, text: str, at: int) -> int:
        """`at`, moved left out of the middle of a control token or tag."""
        first = max(0, at - 200)  # nothing of the kind is longer
        for found in self._edges.finditer(text, first):
            if found.start() >= at:
                break
            if found.end() > at:
                return found.start()
        return at

    def first_tag(self, text: str) -> str:
        """The control token or tag that the text begins with; empty where it begins with none."""
        found = self._edges.match(text)
        return found[0] if found else ""

    def _render(
        self, messages: Messages, tools: Tools, *, prompt: bool = False, marks: bool = False
    ) -> tuple[str, list[Span]]:
        from jinja2 import TemplateError
        from transformers.utils.chat_template_utils import render_jinja_template

        try:
            rendered: Any = render_jinja_template(
                conversations=[list(messages)],
                tools=[dict(tool) for tool in tools] or None,
                chat_template=self._source_with_fixed_day,
                add_generation_prompt=prompt,
                return_assistant_tokens_mask=marks,
                **self._variables,
            )
        except (TemplateError, *_RAISED_BY_EXPRESSIONS) as error:
            raise ChatProblem(f"the chat template refuses the conversation: {error}") from error
        texts, spans = rendered  # of one conversation
        return texts[0], spans[0] if marks else []

    @cached_property
    def _tree(self) -> nodes.Template:
        from jinja2 import Environment, TemplateSyntaxError

        parser = Environment(trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols"])
        try:
            return parser.parse(_GENERATION_TAG.sub("", self.source))
        except TemplateSyntaxError as error:
            raise DataError(
                f"The chat template is no valid Jinja template: line {error.lineno}: {error.message}"
            ) from error


def _with_fixed_day(template: str) -> str:
    """The template with its `strftime_now`, if it calls one, telling a fixed day.

    The function is the library's own global and only plain data can be handed to a template, so a macro of
    that name goes in front: it puts the fixed day's value in the place of each code of the format.
    """
    if "strftime_now" not in template:
        return template
    replaced = "".join(f" | replace({code!r}, {_FIXED_DAY.strftime(code)!r})" for code in _DATE_CODES)
    # The line break goes with the block, and the template still begins at the beginning of a line.
    return "{% macro strftime_now(format) %}{{ format" + replaced + " }}{% endmacro %}\n" + template


def _any_of(texts: set[str]) -> re.Pattern[str]:
    longest_first = sorted((text for text in texts if text), key=lambda text: (-len(text), text))
    return re.compile("|".join(map(re.escape, longest_first)) or "(?!)")
