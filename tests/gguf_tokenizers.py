"""Tiny tokenizers of the kinds that llama.cpp knows, trained on a text that is hard to cut."""

from __future__ import annotations

import json
import re
from functools import cache

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors
from tokenizers.trainers import BpeTrainer
from transformers import PreTrainedTokenizerFast

HARD_TEXT = (
    "I've told you: it's HE'S, we'll 'see.  Don't!\n\n\n  3 33 333 3333 33333 3.14 1,000,000\n"
    "\ttabs\tand   many    spaces   \n \n !?...---===### $5 (a+b)*c <x> x_y\n"
    "Größe naïve Ärger ÉCOLE élan camelCase HTTPServer нещо Привет 東京は12時 工作1314天～ 🦙🦙 😶‍🌫️ e\u0301\n"
    "The quick brown fox jumps over the lazy dog. The dog answers: the fox is quick, quicker, quickest!\r\n"
)
TEMPLATE = (
    "{{ bos_token }}{% if messages[0].role != 'system' %}{{ '<|user|>Be brief.<|end|>\n' }}{% endif %}"
    "{% for m in messages %}{{ '<|' + m.role + '|>' + m.content + '<|end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"
)
_SPECIAL = ["<pad>", "<bos>", "<eos>", "<|system|>", "<|user|>", "<|assistant|>", "<|end|>"]
_WORDS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|"
_REST = r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_CASE = (
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+",
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*",
)
_CASE_REST = r"| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_ENDINGS = "(?i:'s|'t|'re|'ve|'m|'ll|'d)?"
# kind -> (expression that tokenizer.json has; None: GPT-2's own, single digits before, whole words first)
BYTE_LEVEL_CUTS: dict[str, tuple[str | None, bool, bool]] = {
    "gpt-2": (None, False, False),
    "smollm": (None, True, False),
    "llama 3": (_WORDS + r"\p{N}{1,3}" + _REST, False, True),
    "llama 3 by merges": (_WORDS + r"\p{N}{1,3}" + _REST, False, False),
    "qwen2": (_WORDS + r"\p{N}" + _REST, False, False),
    "tekken": (f"{_CASE[0]}|{_CASE[1]}|" + r"\p{N}" + _CASE_REST, False, True),
    "o200k_harmony": (
        f"{_CASE[0]}{_ENDINGS}|{_CASE[1]}{_ENDINGS}|" + r"\p{N}{1,3}" + _CASE_REST,
        False,
        True,
    ),
    "gpt-4o": (f"{_CASE[0]}{_ENDINGS}|{_CASE[1]}{_ENDINGS}|" + r"\p{N}{1,3}" + _CASE_REST, False, False),
}


@cache
def byte_level_bpe(kind: str = "gpt-2") -> PreTrainedTokenizerFast:
    """BPE on bytes, of some 400 tokens, with BOS before texts and a token that is not special."""
    expression, single_digits, whole_words = BYTE_LEVEL_CUTS[kind]
    tokenizer = Tokenizer(models.BPE(ignore_merges=whole_words))
    before = [pre_tokenizers.Digits(individual_digits=True)] if single_digits else []
    if expression is not None:
        before.append(pre_tokenizers.Split(Regex(expression), "isolated"))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [*before, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=expression is None)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = BpeTrainer(
        vocab_size=420, special_tokens=_SPECIAL, initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator([HARD_TEXT] * 3, trainer)
    return _finished(tokenizer)


@cache
def sentencepiece_bpe(with_prefix: bool = True) -> PreTrainedTokenizerFast:
    """BPE on characters with bytes to fall back to, as files of sentencepiece models are converted: every
    pair of tokens that makes a token is a merge, in the order of the tokens' scores."""
    space = normalizers.Replace(" ", "▁")
    trained = Tokenizer(models.BPE())
    trained.normalizer = space
    trained.train_from_iterator([HARD_TEXT[-210:]] * 3, BpeTrainer(vocab_size=140, show_progress=False))
    found = json.loads(trained.to_str())["model"]
    made = [first + second for first, second in found["merges"]]
    pieces = [*(f"<0x{byte:02X}>" for byte in range(256)), *made, *sorted(set(found["vocab"]) - set(made))]
    vocabulary = {text: i for i, text in enumerate(["<unk>", *_SPECIAL, *pieces])}
    merges = [
        (text[:i], text[i:])
        for text in made
        for i in range(1, len(text))
        if text[:i] in found["vocab"] and text[i:] in found["vocab"]
    ]
    tokenizer = Tokenizer(
        models.BPE(vocabulary, merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True)
    )
    prefix = [normalizers.Prepend("▁")] if with_prefix else []
    tokenizer.normalizer = normalizers.Sequence([*prefix, space])
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    )
    return _finished(tokenizer)


@cache
def gemma4_bpe() -> PreTrainedTokenizerFast:
    """BPE on characters as Gemma-4 has it: not every pair that makes a token is a merge, and newlines that
    follow one another are tokens."""
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    tokenizer.normalizer = normalizers.Replace(" ", "▁")
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(r"\n+"), "isolated")  # for training alone
    tokens = ["<unk>", *_SPECIAL, "<|channel>", *(f"<0x{byte:02X}>" for byte in range(256))]
    trainer = BpeTrainer(vocab_size=420, special_tokens=tokens, show_progress=False)
    tokenizer.train_from_iterator([HARD_TEXT[-310:].replace("\r", "")] * 3, trainer)
    whole = json.loads(tokenizer.to_str())
    whole["added_tokens"] = [
        token for token in whole["added_tokens"] if not re.fullmatch("<0x..>", token["content"])
    ]
    tokenizer = Tokenizer.from_str(json.dumps(whole))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(" ", "merged_with_previous")
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    )
    return _finished(tokenizer)


def _finished(tokenizer: Tokenizer) -> PreTrainedTokenizerFast:
    tokenizer.add_special_tokens(_SPECIAL)
    tokenizer.add_tokens([AddedToken("<think>", normalized=False)])
    bos = tokenizer.token_to_id("<bos>")
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<bos> $A", pair="<bos> $A $B", special_tokens=[("<bos>", bos)]
    )
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<bos>", eos_token="<eos>", pad_token="<pad>"
    )
    fast.chat_template = TEMPLATE
    return fast
