"""A tokenizer as a GGUF file holds it: tokens, their kinds, merges or scores, and how text is cut before.

llama.cpp has three programs for byte pair encoding:

    gpt2    on bytes, after cutting the text by a regular expression that the file only names
            (`tokenizer.ggml.pre`); here it is found by the expression in the tokenizer itself
    llama   sentencepiece's, on characters: of all neighbours that make a token, those whose token has the
            highest score are joined first. Here the order of the merges gives the scores
    gemma4  on characters, by the merges themselves, after cutting the text where newlines begin and end

A tokenizer that works otherwise is refused by name: it would be a silently different one.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from gguf import GGUFWriter, TokenType
from tokenizers import Tokenizer

from qlora_train.data.chat.choice import template_for
from qlora_train.data.tokenizer import BosRule
from qlora_train.errors import ExportError
from qlora_train.export.gguf.architecture import OTHER_WAY

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

SPACE = "\u2581"  # what sentencepiece writes for a space
_WORDS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|"
_REST = r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_UPPER, _LOWER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
_BY_CASE = (
    rf"[^\r\n\p{{L}}\p{{N}}]?{_UPPER}*{_LOWER}+%s|[^\r\n\p{{L}}\p{{N}}]?{_UPPER}+{_LOWER}*%s|"
    r"%s| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_CONTRACTIONS = "(?i:'s|'t|'re|'ve|'m|'ll|'d)?"
_GPT2 = "the expression of ByteLevel"
_CUTS: dict[tuple[tuple[str, ...], bool], str] = {
    ((_GPT2,), False): "gpt-2",
    (("digits", _GPT2), False): "smollm",
    ((_WORDS + r"\p{N}{1,3}" + _REST,), True): "llama-bpe",
    ((_WORDS + r"\p{N}{1,3}" + _REST,), False): "smaug-bpe",
    ((_WORDS + r"\p{N}" + _REST,), False): "qwen2",
    ((_BY_CASE % ("", "", r"\p{N}"),), True): "tekken",
    ((_BY_CASE % (_CONTRACTIONS, _CONTRACTIONS, r"\p{N}{1,3}"),), False): "gpt-4o",
}
"""(how text is cut, whether a whole word that is a token is taken without merges) -> llama.cpp's name."""
_SHOWN = (
    *("<|channel>", "<channel|>", "<|tool_call>", "<tool_call|>", "<|tool_response>", "<tool_response|>"),
    '<|"|>',
)
"""Special tokens of Gemma-4 that programs look for in an answer, so that they must be shown."""
_CUT_BY_CASE = ("tekken", "gpt-4o")  # llama.cpp knows the case of A to Z alone


class GgufTokenizer:
    """A tokenizer's parts for a GGUF file. num_rows: of the embedding. stop_ids: tokens that end an answer.
    is_gemma4: whether llama.cpp reads it by that program.

    Raises `ExportError` for a tokenizer that llama.cpp cannot follow.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        num_rows: int,
        stop_ids: Sequence[int],
        folder: Path,
        is_gemma4: bool = False,
    ) -> None:
        self._tokenizer, self._stop_ids, self._folder = tokenizer, stop_ids, folder
        self._file: dict[str, Any] = json.loads(tokenizer.backend_tokenizer.to_str())
        self._model: dict[str, Any] = self._file["model"]
        if self._model["type"] != "BPE" or not stop_ids:
            missing = "one without a token that ends texts" if not stop_ids else self._model["type"]
            raise self._refusal(f"a tokenizer of the kind {missing}")
        pairs = [pair.split(" ") if isinstance(pair, str) else pair for pair in self._model["merges"]]
        self._merges: list[tuple[str, str]] = [(first, second) for first, second in pairs]
        self._is_spm = bool(self._model.get("byte_fallback"))
        self._is_gemma4 = is_gemma4 and self._is_spm
        before = BosRule(tokenizer).apply([])
        if before not in ([], [tokenizer.bos_token_id]):
            raise self._refusal(f"a tokenizer that puts the tokens {before} before a text")
        self.adds_bos = bool(before)
        self._tokens, self._types = self._list_tokens(num_rows)
        self._scores = self._scores_of_merges() if self._is_spm and not self._is_gemma4 else []
        self._space_prefix = self._find_space_prefix() if self._is_spm else False
        self._in_pieces: list[str] = []
        self._cut = "default" if self._is_spm else self._find_cut()
        if self._is_gemma4:
            self._check_newlines()

    def write(self, writer: GGUFWriter, log: Callable[[str], None]) -> None:
        tokenizer = self._tokenizer
        writer.add_tokenizer_model("gemma4" if self._is_gemma4 else "llama" if self._is_spm else "gpt2")
        if not self._is_gemma4:
            writer.add_tokenizer_pre(self._cut)
        writer.add_vocab_size(len(self._tokens))
        writer.add_token_list(self._tokens)
        writer.add_token_types(self._types)
        if self._is_spm:
            writer.add_add_space_prefix(self._space_prefix)
        if self._scores:
            writer.add_token_scores(self._scores)
        else:
            end = self._tokens[self._stop_ids[0]]  # llama.cpp wants merges; this one is never met in a text
            writer.add_token_merges([" ".join(pair) for pair in self._merges] or [f"{end} {end}"])
        writer.add_add_bos_token(self.adds_bos)
        writer.add_add_eos_token(False)
        ends = dict.fromkeys([tokenizer.eos_token_id, *self._stop_ids])
        named: list[tuple[Callable[[int], None], int | None]] = [
            (writer.add_bos_token_id, tokenizer.bos_token_id),
            (writer.add_unk_token_id, tokenizer.unk_token_id),
            (writer.add_pad_token_id, tokenizer.pad_token_id),
            *zip(
                (writer.add_eos_token_id, writer.add_eot_token_id, writer.add_eom_token_id),
                [end for end in ends if end is not None],
                strict=False,
            ),
        ]
        for add, token in named:
            if token is not None:
                add(token)
        if tokenizer.chat_template:
            writer.add_chat_template(template_for(tokenizer, with_tools=False))
        for line in self._remarks():
            log(f"tokenizer: llama.cpp {line}")

    def _remarks(self) -> Iterator[str]:
        """What llama.cpp does otherwise in corners of a text."""
        if {"type": "NFC"} in self._steps("normalizer"):
            yield "does not compose accents (NFC): write them as one character in prompts"
        if self._in_pieces:
            some = f"{len(self._in_pieces):,} of them, such as {self._in_pieces[0]!r},"
            yield f"does not take every word that is a token as one: {some} become several"
        if self._cut in _CUT_BY_CASE:
            yield "cuts words in capitals that begin with an accent or mark otherwise"
        if any(step.get("prepend_scheme") == "first" for step in self._steps("pre_tokenizer")):
            yield "puts a space behind every control token, training only before a text that begins with none"

    @property
    def stop_texts(self) -> list[str]:
        return [self._tokens[token] for token in self._stop_ids]

    def _list_tokens(self, num_rows: int) -> tuple[list[str], list[int]]:
        """(text, kind) of every row of the embedding."""
        vocabulary = self._tokenizer.get_vocab()
        last = max(vocabulary.values())
        if last >= num_rows:
            raise ExportError(
                f"{self._folder}: the tokenizer has tokens up to {last}, the model's embedding has {num_rows}"
                " rows. Use the tokenizer that belongs to this base."
            )
        texts, kinds = [f"[PAD{i}]" for i in range(num_rows)], [int(TokenType.UNUSED)] * num_rows
        for text, token in vocabulary.items():
            texts[token], kinds[token] = text, int(TokenType.NORMAL)
        joined = {first + second for first, second in self._merges}
        for token, added in self._tokenizer.added_tokens_decoder.items():
            if added.lstrip or added.rstrip or added.single_word:
                raise self._refusal(f"the token {added.content!r}, which looks at the characters beside it,")
            if added.special and not (self._is_gemma4 and added.content in _SHOWN):
                kinds[token] = int(TokenType.CONTROL)
            elif added.special or added.content not in joined:  # else merges make it
                kinds[token] = int(TokenType.USER_DEFINED)
                if self._is_spm and added.normalized:  # compared with texts whose spaces are replaced
                    texts[token] = added.content.replace(SPACE, " ")
        if self._is_spm:
            for byte in range(256):
                if (piece := f"<0x{byte:02X}>") in vocabulary:
                    kinds[vocabulary[piece]] = int(TokenType.BYTE)
            if (unknown := self._model.get("unk_token")) is not None:
                kinds[vocabulary[unknown]] = int(TokenType.UNKNOWN)
        return texts, kinds

    def _scores_of_merges(self) -> list[float]:
        """A score for every token, by the place of its merges. Raises `ExportError` where those are not all
        pairs of tokens that make it, or not next to each other."""
        ranks: dict[str, int] = {}
        last = ""
        for first, second in self._merges:
            text = first + second
            if text != last and text in ranks:
                raise self._refusal(f"a tokenizer whose merges for {text!r} are not next to each other")
            ranks.setdefault(text, len(ranks))
            last = text
        normal = {
            text for text, kind in zip(self._tokens, self._types, strict=True) if kind == TokenType.NORMAL
        }
        merges = set(self._merges)
        for text in normal:
            pairs = [(text[:i], text[i:]) for i in range(1, len(text))]
            missing = [p for p in pairs if p not in merges and p[0] in normal and p[1] in normal]
            if missing or (pairs and text not in ranks):
                raise self._refusal(f"a tokenizer without all merges that make its token {text!r}")
        return [-float(ranks.get(text, 0)) for text in self._tokens]

    def _check_newlines(self) -> None:
        """Raises `ExportError` where tokens would change as llama.cpp cuts texts at newlines, and takes
        newlines that are a token without merges."""
        for text, token in self._model["vocab"].items():
            if "\n" not in text:
                continue
            if text.strip("\n") or self._tokenizer.backend_tokenizer.encode(
                text, add_special_tokens=False
            ).ids != [token]:
                raise self._refusal(f"a tokenizer with the token {text!r}")

    def _find_space_prefix(self) -> bool:
        """Whether a text gets a space before it. Raises `ExportError` where more is done to a text."""
        prefix = False
        for step in [*self._steps("normalizer"), *self._steps("pre_tokenizer")]:
            kind = step["type"]
            if kind == "Prepend" and step["prepend"] == SPACE:
                prefix = True
            elif kind == "Metaspace" and step["replacement"] == SPACE and not step["split"]:
                prefix = step["prepend_scheme"] != "never"
            elif kind not in ("Replace", "Split") or step["pattern"] != {"String": " "}:
                raise self._refusal(f"a tokenizer with the step {json.dumps(step)}")
        return prefix

    def _find_cut(self) -> str:
        """llama.cpp's name for how text is cut into words."""
        cuts: list[str] = []
        steps = list(self._steps("pre_tokenizer"))
        for step in steps:
            kind = step["type"]
            if kind == "ByteLevel" and not step["add_prefix_space"]:
                cuts += [_GPT2] if step["use_regex"] else []
            elif kind == "Digits" and step["individual_digits"]:
                cuts.append("digits")
            elif kind == "Split" and step["behavior"] == "Isolated" and not step["invert"]:
                cuts.append(step["pattern"].get("Regex", ""))
            else:
                raise self._refusal(f"a tokenizer with the step {json.dumps(step)}")
        if [step for step in self._steps("normalizer") if step["type"] != "NFC"]:
            raise self._refusal(f"a tokenizer that changes texts ({json.dumps(self._file['normalizer'])})")
        if not any(step["type"] == "ByteLevel" for step in steps):
            raise self._refusal("a tokenizer of characters")
        if not self._merges:  # every byte is a token, wherever the text is cut
            return "gpt-2"
        takes_words = bool(self._model.get("ignore_merges"))
        name = _CUTS.get((tuple(cuts), takes_words))
        if name is None and takes_words and (name := _CUTS.get((tuple(cuts), False))) is not None:
            self._in_pieces = self._words_that_merges_do_not_make()
        if name is None:
            raise self._refusal(f"a tokenizer that cuts texts by {cuts}")
        return name

    def _words_that_merges_do_not_make(self) -> list[str]:
        """Texts that are one token only because a word that is a token is taken without merges."""
        model = self._model | {"ignore_merges": False}
        by_merges = Tokenizer.from_str(json.dumps(self._file | {"model": model}))
        whole = self._tokenizer.backend_tokenizer
        texts = [whole.decode([token]) for token in self._model["vocab"].values()]
        found = (one.encode_batch_fast(texts, add_special_tokens=False) for one in (whole, by_merges))
        return [text for text, ours, merged in zip(texts, *found, strict=True) if ours.ids != merged.ids]

    def _steps(self, part: str) -> Iterator[dict[str, Any]]:
        """The steps of the normalizer or pre_tokenizer, one after the other."""
        whole = self._file[part] or {"type": "Sequence"}
        if whole["type"] == "Sequence":
            yield from whole.get("normalizers", whole.get("pretokenizers", ()))
        else:
            yield whole

    def _refusal(self, what: str) -> ExportError:
        return ExportError(f"{self._folder}: {what} is not among what --to gguf can write. {OTHER_WAY}")
