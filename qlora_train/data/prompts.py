"""A prompt as training saw prompts: the tokens that a training example with this question begins with, and
the tokens that end its answer.

Generation that formats a prompt otherwise than training did is the commonest way to make a good adapter
look bad.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence, Set
from typing import TYPE_CHECKING, cast

from qlora_train.data.building import open_data
from qlora_train.data.chat.chat_format import ChatFormat
from qlora_train.data.chat.template import ChatProblem
from qlora_train.data.column_advice import chats_of_pairs
from qlora_train.data.content import LONE_SURROGATE
from qlora_train.data.control_text import ControlText, without_marks
from qlora_train.data.encoding import CannotEncode, TextEncoder
from qlora_train.data.formats import CHAT_FORMATS, ROLES, PromptTemplate
from qlora_train.data.tokenizer import BosRule
from qlora_train.data.tokenizing import tokenize
from qlora_train.errors import DataError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from qlora_train.recipe import DataSection


def encode_prompt(
    prompt: str, data: DataSection | None, tokenizer: PreTrainedTokenizerBase, *, system: str | None = None
) -> list[int]:
    """Token ids to generate from. system: a system message before it, where prompts are conversations.

    messages and alpaca (if only for a part of the data): one user message through the chat template, with its
    generation prompt; the text of a special token in it is text. prompt_completion: the filled
    prompt_template; with several columns in it, `prompt` is a JSON object of them. text: the prompt. Before
    each stands what the tokenizer puts before a text (BOS, for most). Without `data` (a model that nobody
    trained here): the chat template if there is one, else text. Raises DataError for a prompt that does not
    fit the template, or a chat template that is missing or refuses it.
    """
    if is_chat(data, tokenizer):
        question = {"role": "user", "content": prompt}
        first = [] if system is None else [{"role": "system", "content": system}]
        return encode_messages([*first, question], data, tokenizer)
    if system is not None:
        raise DataError("A system message needs conversations, and this model's prompts are plain text.")
    if data is not None and data.prompt_template is not None:
        prompt = _fill(PromptTemplate(data.prompt_template), prompt)
    return encode_raw(prompt, tokenizer)


def encode_messages(
    messages: Sequence[Mapping[str, str]], data: DataSection | None, tokenizer: PreTrainedTokenizerBase
) -> list[int]:
    """Token ids of a conversation ({"role", "content"} each) that the assistant is to continue, written as in
    training. Raises DataError where the chat template is missing or refuses it."""
    for message in messages:
        _refuse_half_characters(message["content"])
    control_text, options = ControlText(tokenizer), {} if data is None else data.chat_template_kwargs
    writer = ChatFormat(tokenizer, (), options=options).writer(with_tools=False)
    plain = [dict(message) for message in messages]
    try:
        text = writer.render(plain, prompt=True)
        marked = writer.render(control_text.mark(plain), prompt=True) if control_text.is_in(plain) else text
    except ChatProblem as problem:
        raise DataError(f"The prompt cannot be written as a conversation: {problem}") from problem
    is_exact = marked != text and without_marks(marked) == text
    encoder = TextEncoder(tokenizer, control_text) if is_exact else TextEncoder(tokenizer)
    try:
        encoded = encoder.one(marked if is_exact else text)
    except CannotEncode:
        encoded = TextEncoder(tokenizer).one(text)
    return BosRule(tokenizer).apply(encoded.token_ids.tolist())


def encode_raw(prompt: str, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Token ids of the text as it is, behind what the tokenizer puts before a text. Raises DataError for a
    prompt without a token.
    """
    _refuse_half_characters(prompt)
    token_ids = BosRule(tokenizer).apply(tokenize(tokenizer, prompt).input_ids)
    if not token_ids:
        raise DataError("The prompt is empty.")
    return token_ids


def _refuse_half_characters(text: str) -> None:
    if found := LONE_SURROGATE.search(text):
        raise DataError(f"The prompt holds {found[0]!r}, half a character, and is no valid text.")


def stop_token_ids(
    tokenizer: PreTrainedTokenizerBase, named: Sequence[int], data: DataSection | None = None
) -> tuple[int, ...]:
    """The tokens that end an answer: what generation_config.json names (`read_stop_ids`), the tokenizer's
    EOS, and what its chat templates put behind a plain answer, which training supervises and which need not
    be among them (a base model's EOS often ends whole documents).

    data: of the run, for its chat_template_kwargs; None for a model that nobody trained here.
    """
    ids = [*named] if tokenizer.eos_token_id is None else [*named, int(tokenizer.eos_token_id)]
    if tokenizer.chat_template:
        options = {} if data is None else data.chat_template_kwargs
        try:
            found = ChatFormat(tokenizer, named, options=options).new_stop_texts()
        except DataError:  # a template that conversations cannot be written with: no answer ends by it
            found = ()
        ids += [cast(int, tokenizer.convert_tokens_to_ids(text)) for text in found]
    return tuple(dict.fromkeys(ids))


def is_chat(data: DataSection | None, tokenizer: PreTrainedTokenizerBase) -> bool:
    """Whether a model's prompts are conversations; they are where only some of the training data was."""
    if data is None:
        return bool(tokenizer.chat_template)
    return not _formats(data).isdisjoint(CHAT_FORMATS)


def how_to_chat(data: DataSection | None, tokenizer: PreTrainedTokenizerBase) -> str:
    """The end of a sentence: settings that make conversations of a model's plain prompts; empty where none
    do."""
    is_pairs = data is not None and data.prompt_template is None and _formats(data) == {"prompt_completion"}
    if data is None or not is_pairs or not tokenizer.chat_template:
        return ""
    return f"; to train chats by the base's chat template, set {chats_of_pairs(data.columns)}"


def _formats(data: DataSection) -> Set[str]:
    """The formats of the data, from its files only where the section does not tell."""
    if data.format != "auto":
        return {data.format}
    if data.prompt_template is not None:
        return {"prompt_completion"}
    mapped = {name for name, roles in ROLES.items() if set(data.columns) <= set(roles)}
    return mapped if len(mapped) == 1 else open_data(data).formats


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
