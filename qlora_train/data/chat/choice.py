"""Which chat template a run writes conversations with.

`model.chat_template` is the name of a template written here, a Jinja file, or, where the tokenizer has
several templates, the name of one of them. Without it the tokenizer's own counts; of several it takes, as
the library does, `default`, and `tool_use` for examples with tools.

Of the templates written here, only `chatml` needs tokens that a tokenizer may lack, and is refused without
them. In the others an answer ends in EOS, so nothing else has to be learned or listed as a stop token.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from qlora_train.errors import DataError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_CHATML = (
    "{% for m in messages %}"
    "{{ '<|im_start|>' + m.role + '\n' + (m.content or '') + '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
_PLAIN = (
    "{% for m in messages %}"
    "{% if m.role == 'system' %}{{ (m.content or '') + '\n\n' }}"
    "{% elif m.role == 'assistant' %}{{ 'Assistant: ' + (m.content or '') + eos_token + '\n' }}"
    "{% else %}{{ m.role | capitalize + ': ' + (m.content or '') + '\n' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'Assistant:' }}{% endif %}"
)
_INSTRUCTION = (
    "{% for m in messages %}"
    "{% if m.role == 'system' %}{{ (m.content or '') + '\n\n' }}"
    "{% elif m.role == 'assistant' %}{{ '### Response:\n' + (m.content or '') + eos_token + '\n\n' }}"
    "{% else %}{{ '### Instruction:\n' + (m.content or '') + '\n\n' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '### Response:\n' }}{% endif %}"
)
BUILT_IN = {"chatml": _CHATML, "plain": _PLAIN, "instruction": _INSTRUCTION}
_NEEDED_TOKENS = {"chatml": ("<|im_start|>", "<|im_end|>")}


def choose_chat_template(tokenizer: PreTrainedTokenizerBase, chosen: str) -> str:
    """The source of what `model.chat_template` names. Raises DataError: no such name or file, tokens that the
    tokenizer lacks."""
    own = tokenizer.chat_template if isinstance(tokenizer.chat_template, dict) else {}
    if chosen in own:
        return str(own[chosen])
    if chosen in BUILT_IN:
        missing = set(_NEEDED_TOKENS.get(chosen, ())) - tokenizer.added_tokens_encoder.keys()
        if missing:
            raise DataError(
                f"model.chat_template: {chosen} needs the tokens {', '.join(sorted(missing))}, which the "
                f"tokenizer does not have. Name them in model.add_tokens, or use "
                f"{' or '.join(name for name in BUILT_IN if name != chosen)}, which need none."
            )
        return BUILT_IN[chosen]
    file = Path(chosen).expanduser()
    if not file.is_file():
        names = ", ".join((*BUILT_IN, *own))
        raise DataError(
            f"model.chat_template: {chosen} is no template that comes with the program ({names}), and no "
            f"file (looked in {Path.cwd()})."
        )
    try:
        source = file.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"model.chat_template: {file} cannot be read: {error}") from error
    if not source.strip():
        raise DataError(f"model.chat_template: {file} is empty.")
    return source


def template_for(tokenizer: PreTrainedTokenizerBase, *, with_tools: bool) -> str:
    """The tokenizer's template for a conversation. Raises DataError where it has none, or cannot choose."""
    if not tokenizer.chat_template:
        raise DataError(
            "The tokenizer has no chat template, which conversations (format messages or alpaca) need. Set "
            f"model.chat_template to {', '.join(BUILT_IN)} or a Jinja file, use the instruction-tuned "
            "variant of the base, or use data.format prompt_completion with a prompt_template."
        )
    try:
        return str(tokenizer.get_chat_template(tools=[{}] if with_tools else None))
    except ValueError as error:
        names = ", ".join(sorted(tokenizer.chat_template))
        raise DataError(
            f"The tokenizer has several chat templates ({names}) and none is its default: name one in "
            "model.chat_template."
        ) from error


def said_choice(tokenizer: PreTrainedTokenizerBase) -> str | None:
    """A line about the choice among several templates; None where there is one."""
    own = tokenizer.chat_template
    if not isinstance(own, dict) or len(own) < 2:
        return None
    with_tools = "; rows with tools by 'tool_use'" if "tool_use" in own else ""
    return (
        f"the tokenizer has several chat templates ({', '.join(sorted(own))}): conversations are written by "
        f"'default'{with_tools} (model.chat_template names another)"
    )
