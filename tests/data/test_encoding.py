"""Where a prompt's tokens end and its answer's begin, whatever would join there."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from qlora_train.data.chat.chat_format import ChatFormat
from qlora_train.data.content import Chat, Completion, Content
from qlora_train.data.documents import Document
from qlora_train.data.encoding import TextEncoder
from qlora_train.data.prompts import encode_prompt, encode_raw
from qlora_train.data.tokenization import ExampleTokenizer, TokenizedExample

MakeTokenizer = Callable[..., Any]

HEADER = (
    "{% for m in messages %}<|start|>{{ m.role }}\n{{ m.content }}<|end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|start|>assistant\n{% endif %}"
)


def documents(tokenizer: Any, content: Content) -> list[Document]:
    chat_format = ChatFormat(tokenizer, (3,)) if isinstance(content, Chat) else None
    (example,) = ExampleTokenizer(tokenizer, chat_format, sequence_length=500).tokenize([content])
    assert isinstance(example, TokenizedExample)
    return example.documents


def exchange(*turns: str) -> Chat:
    roles = ("user", "assistant") * len(turns)
    return Chat(tuple({"role": role, "content": text} for role, text in zip(roles, turns, strict=False)))


def answers(document: Document) -> list[list[int]]:
    """The runs of supervised tokens."""
    edges = np.flatnonzero(np.diff(document.supervised.astype(int), prepend=0, append=0))
    return [document.token_ids[a:b].tolist() for a, b in zip(edges[::2], edges[1::2], strict=True)]


def test_a_line_break_is_not_shared_by_prompt_and_answer(make_tokenizer: MakeTokenizer) -> None:
    tokenizer = make_tokenizer(bos=False, merges=("Ċ Ċ", "o k"))
    tokenizer.chat_template = HEADER
    (document,) = documents(tokenizer, exchange("q", "\nok"))
    prompt = encode_prompt("q", None, tokenizer)
    assert document.token_ids[: len(prompt)].tolist() == prompt
    ((*said, end),) = answers(document)
    assert tokenizer.convert_ids_to_tokens(said) == ["Ċ", "ok"]
    assert end == 3
    first, second = documents(tokenizer, exchange("q", "\nok", "r", "ok"))  # the history has it joined
    assert tokenizer.convert_ids_to_tokens(answers(first)[0]) == ["Ċ", "ok", "<|end|>"]
    assert len(answers(second)) == 1
    (shared,) = documents(tokenizer, exchange("q", "ok", "r", "ok"))
    assert len(answers(shared)) == 2


def test_a_token_that_swallows_white_space_is_the_prompts(make_tokenizer: MakeTokenizer) -> None:
    tokenizer = make_tokenizer(bos=False)
    swallowing = AddedToken("<|start|>", rstrip=True, special=True, normalized=False)
    tokenizer.backend_tokenizer.add_special_tokens([swallowing])
    tokenizer.add_special_tokens({"additional_special_tokens": [swallowing, "<|end|>"]})
    tokenizer.chat_template = HEADER.replace("<|start|>{{ m.role }}", "{{ m.role }}<|start|>").replace(
        "<|start|>assistant", "assistant<|start|>"
    )
    for said, kept in ((" ok", "ok"), ("ok", "ok"), ("\n\n  ok", "ok"), ("", "")):
        for document in documents(tokenizer, exchange("q", said or "x", "r", said or "x")):
            for run in answers(document):
                assert tokenizer.decode(run) == (kept or "x") + "<|end|>"
                assert tokenizer.convert_tokens_to_ids("<|start|>") not in run


def test_an_answer_may_begin_with_a_token_that_swallows_what_is_before(make_tokenizer: MakeTokenizer) -> None:
    tokenizer = make_tokenizer(bos=False)
    tokenizer.add_tokens(
        [AddedToken("<e>", lstrip=True, special=True, normalized=False)], special_tokens=True
    )
    (document,) = documents(tokenizer, Completion("p \n", "<e>x"))
    assert document.token_ids[:3].tolist() == encode_raw("p \n", tokenizer)
    assert tokenizer.decode(answers(document)[0]) == "<e>x</s>"


def sentencepiece_like(*, legacy: bool, scheme: str = "first") -> PreTrainedTokenizerFast:
    letters = ["▁", *"abcdefghijklmnopqrstuvwxyz:.\n"]
    words = ["<unk>", "<s>", "</s>", "<|end|>", *letters, "▁a", "▁b", "▁x", "ab"]
    merges = [("▁", "a"), ("▁", "b"), ("▁", "x"), ("a", "b")]
    inner = Tokenizer(models.BPE({w: i for i, w in enumerate(words)}, merges, unk_token="<unk>"))
    if legacy:
        inner.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
        inner.decoder = decoders.Sequence(
            [decoders.Replace("▁", " "), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
        )
    else:
        inner.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme=scheme, split=False)
        inner.decoder = decoders.Metaspace(prepend_scheme=scheme, split=False)
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=inner, bos_token="<s>", eos_token="</s>", unk_token="<unk>"
    )
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|end|>"]})
    return tokenizer


@pytest.mark.parametrize("legacy", [True, False])
@pytest.mark.parametrize("scheme", ["first", "always", "never"])
@pytest.mark.parametrize(
    ("prompt", "answer"),
    [("q: ", "ab"), ("q:", " ab"), ("q:", "ab"), ("a", "b"), ("q a", "b x"), ("q\n", "\nab"), ("<s>q", " x")],
)
def test_no_space_is_made_up_between_prompt_and_answer(
    legacy: bool, scheme: str, prompt: str, answer: str
) -> None:
    tokenizer = sentencepiece_like(legacy=legacy, scheme=scheme)
    (document,) = documents(tokenizer, Completion(prompt, answer))
    before = encode_raw(prompt, tokenizer)
    assert document.token_ids[: len(before)].tolist() == before
    assert document.supervised.tolist() == [False] * len(before) + [True] * (len(document) - len(before))
    as_one = tokenizer(prompt + answer, add_special_tokens=False).input_ids
    assert tokenizer.decode(document.token_ids) == tokenizer.decode(as_one) + "</s>"


def test_starts_of_texts_without_tokenising_them_again(make_tokenizer: MakeTokenizer) -> None:
    """The same number as the long way round, at every character."""
    tokenizer = make_tokenizer(merges=("a b", "Ċ Ċ", "ab ab", "Ġ a"))
    encoder = TextEncoder(tokenizer)
    text = "<s>ab ab\n\nabab<|end|>\n\na<|start|>é ab\n<|end|>"
    whole = encoder.one(text)
    for at in range(len(text) + 1):
        alone = tokenizer(text[:at], add_special_tokens=False).input_ids
        is_start = whole.token_ids[: len(alone)].tolist() == alone
        assert encoder.num_tokens_of_start(whole, text, at) == (len(alone) if is_start else None), text[:at]
