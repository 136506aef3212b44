"""Miniature chat templates, one of each kind that popular models have, and conversations for them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast
from transformers.utils.chat_template_utils import render_jinja_template

from qlora_train.data.chat.chat_format import ChatFormat
from qlora_train.data.chat.pieces import Piece
from qlora_train.data.notes import Notes

Message = dict[str, Any]

SPECIALS = [
    *("<|bos|>", "<|eos|>", "<|system|>", "<|user|>", "<|bot|>", "<|tool|>", "<|end|>", "<|return|>"),
    *("<|channel|>", "<|message|>", "<|call|>", "<|called|>"),
]
ASK = "{% if add_generation_prompt %}<|bot|>{% endif %}"
OPEN = "{% if add_generation_prompt %}<|bot|>(thought){% endif %}"
CLOSED = "{% if add_generation_prompt %}<|bot|>(thought)(/thought){% endif %}"
CUT = "{% set said = (m.content or '').split('(/thought)')[-1] %}"
FIELD = (
    "<|bot|>{% if m.reasoning_content %}(thought)\n{{ m.reasoning_content }}\n(/thought)\n\n{% endif %}"
    "{{ m.content }}<|end|>"
)


def loop(answer: str, other: str = "<|{{ m.role }}|>{{ m.content }}<|end|>", ask: str = ASK) -> str:
    """A template that writes messages one after another: the assistant's, others', and what asks."""
    return (
        "{% for m in messages %}{% if m.role == 'assistant' %}"
        + answer
        + "{% else %}"
        + other
        + "{% endif %}{% endfor %}"
        + ask
    )


SYSTEM_IN_LAST = (
    "{% if m.role == 'user' %}<|user|>{% if loop.last and messages[0].role == 'system' %}"
    "{{ messages[0].content }} {% endif %}{{ m.content }}<|end|>{% endif %}"
)
CALLS = (
    "<|bot|>{{ m.content or '' }}"
    "{% for c in m.tool_calls or [] %}<|call|>{{ c.function | tojson }}{% endfor %}<|end|>"
)
TEXT_CALLS = CALLS.replace("{{ c.function | tojson }}", "{{ c.function.name + ' ' + c.function.arguments }}")

TEMPLATES = {
    "plain": loop("<|bot|>{{ m.content }}<|end|>"),
    "line behind the end": loop("<|bot|>\n{{ m.content }}<|end|>\n", ask=ASK.replace("<|bot|>", "<|bot|>\n")),
    "trims, with a space before": loop("<|bot|> {{ m.content | trim }}<|end|>\n"),
    "channel header": loop("<|bot|><|channel|>final<|message|>{{ m.content }}<|end|>"),
    "eos when closed": loop(
        "<|bot|>{{ m.content }}<|end|>",
        ask="{% if add_generation_prompt %}<|bot|>{% else %}<|eos|>{% endif %}",
    ),
    "always asks": loop("<|bot|>{{ m.content }}<|end|>", ask="<|bot|>"),
    "end between turns only": loop(
        "<|bot|>{{ m.content }}{% if not loop.last or add_generation_prompt %}<|end|>{% endif %}"
    ),
    "next role stops": loop("<|bot|>{{ m.content }}", "<|{{ m.role }}|>{{ m.content }}"),
    "no control token": loop(
        "Bot: {{ m.content }}\n",
        "{{ m.role }}: {{ m.content }}\n",
        "{% if add_generation_prompt %}Bot:{% endif %}",
    ),
    "other end in history": loop("<|bot|>{{ m.content }}{{ '<|return|>' if loop.last else '<|end|>' }}"),
    "closers before the end": loop("<|bot|>[{{ m.content }}]<|message|><|end|>"),
    "empty thought in the last turn": loop(
        "<|bot|>{% if loop.last %}(thought)(/thought){% endif %}{{ m.content }}<|end|>"
    ),
    "opens a thought, turns lose it": loop(CUT + "<|bot|>{{ said }}<|end|>", ask=OPEN),
    "opens a thought, turns close it": loop("<|bot|>(/thought){{ m.content }}<|end|>", ask=OPEN),
    "opens a thought, reads the field": loop(FIELD, ask=OPEN.replace("(thought)", "(thought)\n")),
    "closes the thought, turns lose it": loop(CUT + "<|bot|>{{ said }}<|end|>", ask=CLOSED),
    "closes the thought, reads the field": loop(FIELD, ask=CLOSED),
    "thoughts of the last turn": loop(
        "<|bot|>{{ m.content if loop.last else (m.content or '').split('(/thought)')[-1] }}<|end|>"
    ),
    "white space apart": loop(
        CUT + "<|bot|>(thought)(/thought){{ said }}<|end|>", ask=OPEN.replace("(thought)", "(thought)\n")
    ),
    "system in the last question": loop("<|bot|>{{ m.content }}<|end|>", SYSTEM_IN_LAST),
    "calls": loop(CALLS),
    "calls as text": loop(TEXT_CALLS),
    "calls end otherwise": loop(
        "<|bot|>{% if m.tool_calls %}<|call|>{{ m.tool_calls[0].function.name }}<|called|>"
        "{% else %}{{ m.content }}<|end|>{% endif %}"
    ),
    "drops words beside calls": loop(
        "<|bot|>{% if m.tool_calls %}<|call|>{{ m.tool_calls[0].function | tojson }}"
        "{% else %}{{ m.content }}{% endif %}<|end|>"
    ),
    "drops arguments": loop(
        "<|bot|>{{ m.content or '' }}"
        "{% for c in m.tool_calls or [] %}<|call|>{{ c.function.name }}{% endfor %}<|end|>"
    ),
    "drops tool messages": loop(
        CALLS, "{% if m.role != 'tool' %}<|{{ m.role }}|>{{ m.content }}<|end|>{% endif %}"
    ),
    "drops the system message": loop(
        "<|bot|>{{ m.content }}<|end|>",
        "{% if m.role != 'system' %}<|{{ m.role }}|>{{ m.content }}<|end|>{% endif %}",
    ),
    "leaves out empty answers": loop("{% if m.content %}<|bot|>{{ m.content }}<|end|>{% endif %}"),
    "counts messages": "{{ messages | length }}" + loop("<|bot|>{{ m.content }}<|end|>"),
}


def user(text: str) -> Message:
    return {"role": "user", "content": text}


def bot(text: str | None, **more: Any) -> Message:
    return {"role": "assistant", **({} if text is None else {"content": text}), **more}


def call(arguments: Any, text: str | None = "", name: str = "look") -> Message:
    function = {"name": name, "arguments": arguments}
    return bot(text, tool_calls=[{"id": "abcdefghi", "type": "function", "function": function}])


SYSTEM = {"role": "system", "content": "Short."}
RESULT = {"role": "tool", "tool_call_id": "abcdefghi", "name": "look", "content": "found"}
CONVERSATIONS: dict[str, list[Message]] = {
    "two turns": [user("Q1?"), bot("One."), user("Q2?"), bot("Two.")],
    "system": [SYSTEM, user("Q1?"), bot("One."), user("Q2?"), bot("Two.")],
    "white space": [user("Q1?"), bot("\n One. \n"), user("Q2?"), bot("  Two.\n")],
    "equal": [user("x"), bot("x"), user("x"), bot("x")],
    "empty": [user("Q1?"), bot(""), user("Q2?"), bot("Two.")],
    "field": [
        user("Q1?"),
        bot("One.", reasoning_content="warm"),
        user("Q2?"),
        bot("Two.", reasoning_content="cold"),
    ],
    "inline": [
        user("Q1?"),
        bot("(thought)warm(/thought)One."),
        user("Q2?"),
        bot("(thought)cold(/thought)Two."),
    ],
    "call": [user("Q1?"), call({"k": "v"}), RESULT, bot("Two.")],
    "words beside a call": [user("Q1?"), call({"k": "v"}, "Wait."), RESULT, bot("Two.")],
    "call of a number": [user("Q1?"), call({"k": 5}), RESULT, bot("Two.")],
}


def make_tokenizer(source: str | dict[str, str] | None, eos: str = "<|eos|>") -> PreTrainedTokenizerFast:
    """Byte level, one token a byte, with the control tokens above."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    inner = Tokenizer(models.BPE(vocab={letter: i for i, letter in enumerate(alphabet)}, merges=[]))
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    inner.decoder = decoders.ByteLevel()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=inner, bos_token="<|bos|>", eos_token=eos)
    tokenizer.add_special_tokens({"additional_special_tokens": [t for t in SPECIALS if t != eos]})
    tokenizer.chat_template = source
    return tokenizer


def write(
    source: str,
    messages: Sequence[Message],
    stops: Sequence[str] = ("<|end|>",),
    *,
    tools: Sequence[dict[str, Any]] = (),
    **settings: Any,
) -> tuple[list[Piece], Notes]:
    """The pieces of every answer, and what was counted. stops: what generation_config.json names."""
    tokenizer = make_tokenizer(source)
    chat_format = ChatFormat(tokenizer, [tokenizer.convert_tokens_to_ids(stop) for stop in stops], **settings)
    notes = Notes()
    turns = [i for i, message in enumerate(messages) if message["role"] == "assistant"]
    return chat_format.writer(with_tools=bool(tools)).pieces(messages, tools, turns, notes), notes


def prompts(source: str, messages: Sequence[Message], tools: Sequence[dict[str, Any]] = ()) -> list[str]:
    """What generation is handed for each answer, straight from the library."""
    return [
        render_jinja_template(
            [list(messages[:i])], tools=list(tools) or None, chat_template=source, add_generation_prompt=True
        )[0][0]
        for i, message in enumerate(messages)
        if message["role"] == "assistant"
    ]
