"""Which tokens end an answer, and where in a rendered turn the first of them stands.

E = {generation_config.json's eos_token_id ...} + {tokenizer.eos_token} are what generation stops at. Some
checkpoints name none of them that the template writes (a base model's EOS ends documents), so the template is
asked too. With X an answer and a plain question before it,

    tail    what is behind X at the end of a conversation
    after   what is behind X before the next question

the token t is, of the control tokens that both begin with in step, the first in E, else the last; else the
first of the tail that is in E, else the first of the tail; the same of `after`. Where t is not in E it is
added, and said: generation and exported models must stop there too.

Behind a turn, the *first* token of E ends the answer. Only what stands behind the turn's last text is looked
at: some templates say a stop token inside a turn, before a tool call.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from qlora_train.data.chat.stand_ins import stand_in
from qlora_train.data.chat.template import ChatProblem, ChatTemplate
from qlora_train.data.chat.turn_facts import ANSWER, QUESTION

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


@dataclass(frozen=True)
class StopTokens:
    """`texts`: all of E, t included. `found`: t, or None. `is_new`: nothing but the template names t.
    `openers`: the control tokens that turns begin with."""

    texts: tuple[str, ...]
    found: str | None
    is_new: bool
    openers: frozenset[str]


def model_stop_texts(tokenizer: PreTrainedTokenizerBase, stop_ids: Sequence[int]) -> tuple[str, ...]:
    """Texts of generation_config.json's tokens, then EOS."""
    names = [str(tokenizer.decode([token], skip_special_tokens=False)) for token in stop_ids]
    if tokenizer.eos_token is not None:
        names.append(str(tokenizer.eos_token))
    return tuple(dict.fromkeys(name for name in names if name))


def find_stop_tokens(template: ChatTemplate, named: Sequence[str]) -> StopTokens:
    """`named` and what the template puts behind a plain answer (see the top of the file)."""
    tail, after = _around_plain_answer(template)
    tokens = template.control_tokens
    openers = _openers(template)
    found = stop_of(tokens.findall(tail), tokens.findall(after), named, openers)
    if found is None:
        at = first_of(tail, named) or first_of(after, named)
        found = at[1] if at else None
    is_new = found is not None and found not in named
    return StopTokens((*named, *([found] if is_new and found else [])), found, is_new, openers)


def stop_of(tail: list[str], after: list[str], named: Sequence[str], openers: frozenset[str]) -> str | None:
    """t of the control tokens of a tail and of what follows. openers: what turns begin with, which a template
    that always asks for an answer writes behind one too."""
    common = []
    for in_tail, in_after in zip(tail, after, strict=False):
        if in_tail != in_after:
            break
        common.append(in_tail)
    ends = list(common)
    while ends and ends[-1] in openers:
        ends.pop()

    def known(found: list[str]) -> list[str]:
        return [token for token in found if token in named][:1]

    choices = (known(common), ends[-1:], common[:1], known(tail), tail[:1], known(after), after[:1])
    return next((found[0] for found in choices if found), None)


def first_of(text: str, tokens: Sequence[str]) -> tuple[int, str] | None:
    """(position, token) of the first of the tokens in the text; the longest of those that begin there."""
    found = [(at, -len(token), token) for token in tokens if (at := text.find(token)) >= 0]
    if not found:
        return None
    at, _, token = min(found)
    return at, token


def _openers(template: ChatTemplate) -> frozenset[str]:
    """Control tokens before the first question."""
    try:
        text = template.render([QUESTION, ANSWER, QUESTION])
    except ChatProblem:
        return frozenset()
    return frozenset(template.control_tokens.findall(text.partition(QUESTION["content"])[0]))


def _around_plain_answer(template: ChatTemplate) -> tuple[str, str]:
    """(tail, after); empty where the template takes no such conversation."""
    said, then = ANSWER["content"], stand_in(2)
    texts = []
    for messages in ([QUESTION, ANSWER], [QUESTION, ANSWER, {**QUESTION, "content": then}]):
        try:
            _, found, behind = template.render(messages).rpartition(said)
        except ChatProblem:
            found = behind = ""
        texts.append(behind.partition(then)[0] if found else "")
    return texts[0], texts[1]
