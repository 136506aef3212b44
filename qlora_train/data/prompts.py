"""A prompt as training saw prompts: the tokens that a training row with this question begins with.

Generation that formats a prompt otherwise than training did is the commonest way to make a good adapter
look bad. (A prompt whose last characters melt into one token with the answer's first ones cannot be met
exactly: end a `prompt_template` with a line break.)
"""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

from qlora_train.data.chat import ChatProblem, render, require_chat_template
from qlora_train.data.formats import ROLES, PromptTemplate, resolve_format
from qlora_train.data.sources import load_tables
from qlora_train.data.tokenization import BosRule
from qlora_train.errors import DataError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from qlora_train.recipe import DataSection


def encode_prompt(prompt: str, data: DataSection | None, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Token ids to generate from.

    messages and alpaca: one user message through the chat template, with its generation prompt.
    prompt_completion: BOS + the filled prompt_template; with several columns in it, `prompt` is a JSON
    object of them. text: BOS + prompt. Without `data` (a model that nobody trained here): the chat template
    if there is one, else text. Raises DataError for a prompt that does not fit the template, or a chat
    template that is missing or refuses it.
    """
    name = format_of(data) if data is not None else ("messages" if tokenizer.chat_template else "text")
    is_chat = name in ("messages", "alpaca")
    if is_chat:
        text = _as_chat(prompt, tokenizer)
    elif data is not None and data.prompt_template is not None:
        text = _fill(PromptTemplate(data.prompt_template), prompt)
    else:
        text = prompt
    token_ids = tokenizer(text, add_special_tokens=False, verbose=False).input_ids
    token_ids = BosRule(tokenizer).apply(token_ids, is_chat=is_chat)
    if not token_ids:
        raise DataError("The prompt is empty.")
    return token_ids


def format_of(data: DataSection) -> str:
    """`data.format`, with auto resolved: from the mapped roles if they tell, else from the training data's
    columns.
    """
    if data.format != "auto":
        return data.format
    if data.prompt_template is not None:
        return "prompt_completion"
    mapped = [name for name, roles in ROLES.items() if set(data.columns) <= set(roles)]
    if len(mapped) == 1:
        return mapped[0]
    try:
        return resolve_format(data, load_tables(data.train[:1])[0]).name
    except DataError as error:
        raise DataError(
            f"How prompts are written follows from data.format, which is auto, and the data cannot tell: "
            f"{error}\nSet data.format ({', '.join(ROLES)})."
        ) from error


def _as_chat(prompt: str, tokenizer: PreTrainedTokenizerBase) -> str:
    require_chat_template(tokenizer)
    try:
        return render(tokenizer, [{"role": "user", "content": prompt}], generation_prompt=True)
    except ChatProblem as problem:
        raise DataError(f"The prompt cannot be written as a conversation: {problem}") from problem


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
