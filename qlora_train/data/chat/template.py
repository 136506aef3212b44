"""One chat template as a function: messages -> text, in transformers' sandbox, the same text every day.

A template is a program that came with a checkpoint. It is run by `render_jinja_template`, the library's own
immutable sandbox, and sees plain data only. What it may look at besides the messages is fixed here: the
tokenizer's named special tokens, `data.chat_template_kwargs`, and a day that does not pass (a template that
prints today's date would make a resumed run see other tokens than the one it continues).

Whatever a template does, writing a text is bounded in time, memory and length (`expendable`).

`literals` are the texts in the expressions of the template's source, without the ones of one or two
characters, shortest first. They are never trusted to mean anything; they
are what probes (see `thoughts`) try out, so that nothing has to be known by name.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from datetime import datetime
from functools import cached_property
from typing import TYPE_CHECKING, Any, NamedTuple

from qlora_train.boundary import one_line
from qlora_train.data.chat.choice import BUILT_IN
from qlora_train.data.content import MAX_CHARACTERS
from qlora_train.data.expendable import within_limits
from qlora_train.data.tables import ExampleProblem
from qlora_train.errors import DataError

if TYPE_CHECKING:
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
    TypeError, ValueError, LookupError, ArithmeticError, AttributeError, RuntimeError
)  # fmt: skip
_MAX_SOURCE = 2**20  # characters; the longest templates have a tenth
_MAX_CHARACTERS = 4 * MAX_CHARACTERS  # of a text
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
        if len(source) > _MAX_SOURCE:
            raise DataError(
                f"The chat template has {len(source):,} characters, more than the {_MAX_SOURCE:,} of any "
                "template. Set another one with model.chat_template."
            )
        self.source = source
        self.is_built_in = source in BUILT_IN.values()
        self._run = _here if self.is_built_in else within_limits
        self._source_with_fixed_day = _with_fixed_day(source)
        self.names_read, self.literals = self._run(_read, source)
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
        call = _Call(list(messages), [dict(tool) for tool in tools] or None, self._variables, prompt, marks)
        return self._run(_rendered, self._source_with_fixed_day, call)


class _Call(NamedTuple):
    """What a template is handed. marks: whether to tell where its `{% generation %}` blocks are."""

    messages: list[Message]
    tools: list[Any] | None
    variables: Mapping[str, Any]
    prompt: bool
    marks: bool


def _rendered(source: str, call: _Call) -> tuple[str, list[Span]]:
    """The text that a template makes of a call, and its marked spans."""
    from jinja2 import TemplateError
    from transformers.utils.chat_template_utils import render_jinja_template

    try:
        rendered: Any = render_jinja_template(
            conversations=[call.messages],
            tools=call.tools,
            chat_template=source,
            add_generation_prompt=call.prompt,
            return_assistant_tokens_mask=call.marks,
            **call.variables,
        )
    except (TemplateError, *_RAISED_BY_EXPRESSIONS) as error:
        raise ChatProblem(f"the chat template refuses the conversation: {one_line(str(error))}") from error
    texts, spans = rendered  # of one conversation
    if len(texts[0]) > _MAX_CHARACTERS:
        raise DataError(
            f"The chat template writes a text of {len(texts[0]):,} characters, more than the "
            f"{_MAX_CHARACTERS:,} that are read. Set another one with model.chat_template."
        )
    return texts[0], spans[0] if call.marks else []


def _read(source: str) -> tuple[frozenset[str], tuple[str, ...]]:
    """The variables that a template looks up, but those that examples fill, and its literals (see
    `ChatTemplate`). Raises DataError for a source that is no template."""
    from jinja2 import Environment, TemplateSyntaxError, meta, nodes

    parser = Environment(trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols"])
    try:
        tree = parser.parse(_GENERATION_TAG.sub("", source))
        names = frozenset(meta.find_undeclared_variables(tree)) - _HANDED_OVER
        values = {node.value for node in tree.find_all(nodes.Const) if isinstance(node.value, str)}
    except TemplateSyntaxError as error:
        reason = f"line {error.lineno}: {one_line(error.message or '')}"
    except RecursionError:
        reason = "it is nested too deeply"
    else:
        return names, tuple(sorted((v for v in values if len(v.strip()) > 2), key=lambda v: (len(v), v)))
    raise DataError(f"The chat template is no valid Jinja template: {reason}")


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


def _here(function: Callable[..., Any], *arguments: Any) -> Any:
    return function(*arguments)


def _any_of(texts: set[str]) -> re.Pattern[str]:
    longest_first = sorted((text for text in texts if text), key=lambda text: (-len(text), text))
    return re.compile("|".join(map(re.escape, longest_first)) or "(?!)")
