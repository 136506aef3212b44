"""A prompt as training saw prompts: the tokens that a training row with this question begins with.

Generation that formats a prompt otherwise than training did is the commonest way to make a good adapter
look bad. (A prompt whose last characters melt into one token with the answer's first ones cannot be met
exactly: end a `prompt_template` with a line break.)
"""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

from qlora_train.data.chat import ChatProblem, render, require_chat_template
from qlora_train.data.content import LONE_SURROGATE, Chat
from qlora_train.data.control_text import ControlText
from qlora_train.data.formats import CHAT_FORMATS, ROLES, PromptTemplate, resolve_format
from qlora_train.data.sources import load_tables
from qlora_train.data.tokenization import BosRule
from qlora_train.data.tokenizer import special_token_ids
from qlora_train.errors import DataError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from qlora_train.recipe import DataSection


def encode_prompt(prompt: str, data: DataSection | None, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Token ids to generate from.

    messages and alpaca (if only for a part of the data): one user message through the chat template, with its
    generation prompt; the text of a special token in it is text. prompt_completion: BOS + the filled
    prompt_template; with several columns in it, `prompt` is a JSON object of them. text: BOS + prompt.
    Without `data` (a model that nobody trained here): the chat template if there is one, else text. Raises
    DataError for a prompt that does not fit the template, or a chat template that is missing or refuses it.
    """
    if _is_chat(data, tokenizer):
        return _encode_as_chat(prompt, tokenizer)
    if data is not None and data.prompt_template is not None:
        text = _fill(PromptTemplate(data.prompt_template), prompt)
    else:
        text = prompt
    return _encode(text, tokenizer)


def encode_raw(prompt: str, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Token ids of the text as it is; one BOS before it where the tokenizer adds one by itself. Raises
    DataError for a prompt without a token.
    """
    return _encode(prompt, tokenizer)


def _encode_as_chat(prompt: str, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    require_chat_template(tokenizer)
    _refuse_half_characters(prompt)
    chat, control_text = Chat(({"role": "user", "content": prompt},)), ControlText(tokenizer)
    try:
        text = render(tokenizer, chat, generation_prompt=True)
        marked = control_text.marked(chat, generation_prompt=True) if control_text.is_in(prompt) else None
        if marked is not None:
            encoded = control_text.encode(render(tokenizer, marked, generation_prompt=True))
            if encoded is not None:
                return BosRule(tokenizer).apply(encoded.token_ids.tolist())
    except ChatProblem as problem:
        raise DataError(f"The prompt cannot be written as a conversation: {problem}") from problem
    return _encode(text, tokenizer)


def _encode(text: str, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    _refuse_half_characters(text)
    token_ids = tokenizer(text, add_special_tokens=False, verbose=False).input_ids
    token_ids = BosRule(tokenizer).apply(token_ids)
    if not token_ids:
        raise DataError("The prompt is empty.")
    return token_ids


def _refuse_half_characters(text: str) -> None:
    if found := LONE_SURROGATE.search(text):
        raise DataError(f"The prompt holds {found[0]!r}, half a character, and is no valid text.")


def answer_end_ids(tokenizer: PreTrainedTokenizerBase) -> tuple[int, ...]:
    """The tokens that end an answer: EOS, and the special token that the chat template ends an assistant turn
    with (training supervises it, and it need not be EOS: a base model's EOS often ends whole documents).
    """
    ends = [] if tokenizer.eos_token_id is None else [int(tokenizer.eos_token_id)]
    if tokenizer.chat_template:
        exchange = Chat(({"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}))
        try:
            text = render(tokenizer, exchange).rstrip()
        except ChatProblem:  # a template for other conversations than these
            return tuple(ends)
        last = tokenizer(text, add_special_tokens=False, verbose=False).input_ids[-1]
        if last in special_token_ids(tokenizer) and last not in ends:
            ends.append(last)
    return tuple(ends)


def format_of(data: DataSection) -> str:
    """`data.format`, with auto resolved: from the mapped roles if they tell, else from the columns of all
    sources. Where these differ in format it stays auto, which each source then resolves for itself.

    Raises DataError for data that cannot be read or whose format cannot be told.
    """
    if data.format != "auto":
        return data.format
    formats = _formats_of_sources(data)
    return formats.pop() if len(formats) == 1 else "auto"


def _formats_of_sources(data: DataSection) -> set[str]:
    if data.prompt_template is not None:
        return {"prompt_completion"}
    mapped = [name for name, roles in ROLES.items() if set(data.columns) <= set(roles)]
    if len(mapped) == 1:
        return set(mapped)
    sources = data.train if data.eval is None or isinstance(data.eval, float) else (*data.train, *data.eval)
    return {resolve_format(data, table).name for table in load_tables(sources)}


def _is_chat(data: DataSection | None, tokenizer: PreTrainedTokenizerBase) -> bool:
    """Whether prompts are conversations; they are where only some of the training data was."""
    if data is None:
        return bool(tokenizer.chat_template)
    formats = {data.format} if data.format != "auto" else _formats_of_sources(data)
    return not formats.isdisjoint(CHAT_FORMATS)


def _fill(template: PromptTemplate, prompt: str) -> str:
    if len(template.columns) == 1:
        return template.fill({template.columns[0]: prompt})
    columns = ", ".join(template.columns)
    needed = (
        f"data.prompt_template names several columns ({columns}): give the prompt as a JSON object with them."
    )
    try:
        values = json.loads(prompt)
    except ValueError as error:
        raise DataError(needed) from error
    if not isinstance(values, dict) or not all(
        isinstance(values.get(name), str) for name in template.columns
    ):
        raise DataError(needed)
    return template.fill(values)
