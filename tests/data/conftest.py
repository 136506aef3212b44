"""Tiny tokenizers, built here: byte level (one token a byte), so every mask can be written down by hand."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from qlora_train.data.chat.chat_format import ChatFormat
from qlora_train.data.content import Chat, Content
from qlora_train.data.documents import Document
from qlora_train.data.tables import ExampleProblem
from qlora_train.data.tokenization import ExampleTokenizer
from qlora_train.recipe import DataSection

SPECIALS = ["<s>", "</s>", "<|start|>", "<|end|>"]
CHATML = (
    "{{ bos_token }}{% for m in messages %}"
    "{{ '<|start|>' + m.role + '\n' + m.content + '<|end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|start|>assistant\n' }}{% endif %}"
)
# Ends turns with a line only: no end-of-turn token.
PLAIN_TURNS = (
    "{{ bos_token }}{% for m in messages %}{{ m.role[0] + ':' + m.content + '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'a:' }}{% endif %}"
)
# Shows a thinking block in the last turn only, as reasoning models' templates do.
THINKING = (
    "{% for m in messages %}{{ '<|start|>' + m.role[0] + ' ' }}"
    "{% if loop.last and m.role == 'assistant' %}{{ '(think)' }}{% endif %}"
    "{{ m.content + '<|end|>\n' }}{% endfor %}{% if add_generation_prompt %}{{ '<|start|>a ' }}{% endif %}"
)
# Counts the messages at its head: no rendering is a prefix of a longer one.
COUNTING = (
    "{{ messages | length }}:{% for m in messages %}{{ m.role[0] + ' ' }}{% if m.role == 'assistant' %}"
    "MARK{{ m.content }}ENDMARK<|end|>{% else %}{{ m.content }}{% endif %}{{ '\n' }}{% endfor %}"
)
COUNTING_MARKED = COUNTING.replace("ENDMARK", "{% endgeneration %}").replace("MARK", "{% generation %}")
COUNTING = COUNTING.replace("ENDMARK", "").replace("MARK", "")


TEMPLATES = {
    "chatml": CHATML,
    "plain turns": PLAIN_TURNS,
    "thinking": THINKING,
    "counting": COUNTING,
    "counting, marked": COUNTING_MARKED,
    "none": None,
}


def _make_tokenizer(
    template: str = "chatml", *, bos: bool = True, adds_bos: bool = False, merges: tuple[str, ...] = ()
) -> PreTrainedTokenizerFast:
    """`template`: a key of TEMPLATES; `merges`: pairs like "a b" that become one token."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    words = [*SPECIALS, *alphabet, *("".join(pair.split()) for pair in merges)]
    model = models.BPE(
        vocab={word: i for i, word in enumerate(words)}, merges=[tuple(m.split()) for m in merges]
    )
    inner = Tokenizer(model)
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    inner.decoder = decoders.ByteLevel()
    if adds_bos:
        inner.post_processor = processors.TemplateProcessing(
            single="<s> $A", pair="<s> $A $B", special_tokens=[("<s>", 0)]
        )
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=inner,
        bos_token="<s>" if bos else None,
        eos_token="</s>",
        additional_special_tokens=["<|start|>", "<|end|>"],
    )
    tokenizer.chat_template = TEMPLATES[template]
    return tokenizer


@pytest.fixture
def tokenizer() -> PreTrainedTokenizerFast:
    return _make_tokenizer()


@pytest.fixture
def make_tokenizer() -> Callable[..., PreTrainedTokenizerFast]:
    return _make_tokenizer


@pytest.fixture
def jsonl(tmp_path: Path) -> Callable[..., str]:
    def write(*examples: Any, name: str = "rows.jsonl") -> str:
        path = tmp_path / name
        path.write_text("".join(json.dumps(example) + "\n" for example in examples), encoding="utf-8")
        return str(path)

    return write


@pytest.fixture
def section() -> Callable[..., DataSection]:
    def make(train: Any, **keys: Any) -> DataSection:
        return DataSection.model_validate({"train": train, "sequence_length": 64, **keys})

    return make


@pytest.fixture
def show() -> Callable[[PreTrainedTokenizerFast, Any], str]:
    """The document's text with supervised tokens as [token]."""

    def write(tokenizer: PreTrainedTokenizerFast, document: Any) -> str:
        tokens = [tokenizer.decode([token]) for token in document.token_ids.tolist()]
        return "".join(f"[{t}]" if yes else t for t, yes in zip(tokens, document.supervised, strict=True))

    return write


@dataclass
class Tokenized:
    """What became of some contents. `notes`: amounts; `noted`: examples. `of_example`: of each document."""

    documents: list[Document]
    notes: Counter[str]
    noted: Counter[str]
    of_example: list[int]


def tokenize_contents(
    tokenizer: Any,
    *contents: Content,
    length: int = 200,
    chat_format: ChatFormat | None = None,
    **options: Any,
) -> Tokenized:
    """Raises the ExampleProblem of the first content that has one. chat_format: None: one of the
    tokenizer."""
    found = Tokenized([], Counter(), Counter(), [])
    if chat_format is None and any(isinstance(content, Chat) for content in contents):
        chat_format = ChatFormat(tokenizer, ())
    tokenizing = ExampleTokenizer(tokenizer, chat_format, sequence_length=length, **options)
    kinds = groupby(contents, key=lambda content: isinstance(content, Chat))
    results = [result for _, of_a_kind in kinds for result in tokenizing.tokenize(list(of_a_kind))]
    for number, result in enumerate(results):
        if isinstance(result, ExampleProblem):
            raise result
        found.documents += result.documents
        found.of_example += [number] * len(result.documents)
        found.notes += result.notes
        found.noted += Counter(note for note, amount in result.notes.items() if amount)
    return found


@pytest.fixture
def tokenize() -> Callable[..., Tokenized]:
    return tokenize_contents
