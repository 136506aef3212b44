"""Which tokens end an answer, and where in a rendered turn the first of them stands.

E = {generation_config.json's eos_token_id ...} + {tokenizer.eos_token} are what generation stops at. Some
checkpoints name none of them that the template writes (a base model's EOS ends documents), so the template is
asked too. With X an answer and a plain question before it,

    tail    what is behind X at the end of a conversation
    after   what is behind X before the next question

the token t is, of the control tokens that both begin with in step, the first in E, else the last; else the
first of the tail that is in E, else the first of the tail; the same of `after`. Where t is not in E it is
added, and said: generation and exported models must stop there too.

(Templates that always ask for another answer do so behind one, too: that is not part of its tail.)

Behind a turn, the *first* token of E ends the answer. Only what stands behind the turn's last text is looked
at: some templates say a stop token inside a turn, before a tool call.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from os.path import commonprefix
from typing import TYPE_CHECKING

from qlora_train.data.chat.stand_ins import stand_in
from qlora_train.data.chat.template import ChatTemplate
from qlora_train.data.chat.turn_facts import ANSWER, QUESTION, ask

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


@dataclass(frozen=True)
class StopTokens:
    """The tokens that end answers. `texts`: all of E, t included. `found`: t, or None. `is_new`: nothing but
    the template names t. `asks`: what stands behind a question in a template that always asks for an answer,
    empty in all others. `next_turn`: the control token behind t where another turn follows; None where that
    is not known.
    """

    texts: tuple[str, ...]
    found: str | None
    is_new: bool
    asks: str
    next_turn: str | None


def model_stop_texts(tokenizer: PreTrainedTokenizerBase, stop_ids: Sequence[int]) -> tuple[str, ...]:
    """Texts of generation_config.json's tokens, then EOS."""
    names = [str(tokenizer.decode([token], skip_special_tokens=False)) for token in stop_ids]
    if tokenizer.eos_token is not None:
        names.append(str(tokenizer.eos_token))
    return tuple(dict.fromkeys(name for name in names if name))


def find_stop_tokens(template: ChatTemplate, named: Sequence[str]) -> StopTokens:
    """The tokens `named` by the model, and the one that the template puts behind a plain answer (see the top
    of the file)."""
    tail, after = _around_plain_answer(template)
    asks = _always_asks(template)
    found = control_token_at_end(template, tail, after, named, asks)
    if found is None:
        at = first_of(tail, named) or first_of(after, named)
        found = at[1] if at else None
    is_new = found is not None and found not in named
    texts = (*named, found) if found is not None and is_new else tuple(named)
    behind = template.control_tokens.findall(after.partition(found)[2]) if found else []
    return StopTokens(texts, found, is_new, asks, behind[0] if behind else None)


def control_token_at_end(
    template: ChatTemplate, tail: str, after: str, named: Sequence[str], asks: str
) -> str | None:
    """The control token (t) in what is behind an answer at the end of a conversation and before the next
    message. asks: see `StopTokens`."""
    tail = _without_question(tail, asks, template)
    in_tail, in_after = template.control_tokens.findall(tail), template.control_tokens.findall(after)
    common = list(commonprefix([in_tail, in_after]))

    def known(tokens: list[str]) -> list[str]:
        return [token for token in tokens if token in named][:1]

    choices = (known(common), common[-1:], known(in_tail), in_tail[:1], known(in_after), in_after[:1])
    return next((tokens[0] for tokens in choices if tokens), None)


def _without_question(tail: str, asks: str, template: ChatTemplate) -> str:
    """The tail of a template that always asks for another answer, up to where it does. What asks begins with
    the end of the question, which most templates end answers with, too.
    """
    if not asks.strip():
        return tail
    if tail.endswith(asks):
        end = template.control_tokens.search(asks)
        return tail[: len(tail) - len(asks)] + (asks[: end.end()] if end else "")
    num_same = len(commonprefix([tail[::-1], asks[::-1]]))
    return tail[: template.at_edge(tail, len(tail) - num_same)]


def _always_asks(template: ChatTemplate) -> str:
    text, asked = ask(template, [QUESTION]), ask(template, [QUESTION], prompt=True)
    return asked.rpartition(QUESTION["content"])[2] if asked is not None and text == asked else ""


def first_of(text: str, tokens: Sequence[str]) -> tuple[int, str] | None:
    """(position, token) of the first of the tokens in the text; the longest of those that begin there."""
    found = [(at, -len(token), token) for token in tokens if (at := text.find(token)) >= 0]
    if not found:
        return None
    at, _, token = min(found)
    return at, token


def _around_plain_answer(template: ChatTemplate) -> tuple[str, str]:
    """What is behind a plain answer: (tail, after), both empty where the template takes no such
    conversation."""
    said, then = ANSWER["content"], stand_in(2)
    texts = []
    for messages in ([QUESTION, ANSWER], [QUESTION, ANSWER, {**QUESTION, "content": then}]):
        _, found, behind = (ask(template, messages) or "").rpartition(said)
        texts.append(behind.partition(then)[0] if found else "")
    return texts[0], texts[1]
