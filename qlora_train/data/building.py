"""From the recipe's data section to the two packed data sets of a run: open, tokenise (or map from the token
cache), split, weigh, pack."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from qlora_train.data.chat.chat_format import ChatFormat
from qlora_train.data.column_advice import chats_of_pairs
from qlora_train.data.dataset import PackedDataset
from qlora_train.data.formats import CHAT_FORMATS
from qlora_train.data.notes import Note
from qlora_train.data.open_sources import OpenSources
from qlora_train.data.report import Reading
from qlora_train.data.split import chosen_by_weight, num_also_in, split_by_content
from qlora_train.data.token_cache import tokenized_or_kept
from qlora_train.data.tokenization import ExampleTokenizer
from qlora_train.data.tokenized_examples import Facts, TokenizedExamples
from qlora_train.errors import DataError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from qlora_train.recipe import DataSection


@dataclass(frozen=True)
class OpenData:
    """The sources of a data section, opened: their formats are known, their examples not read yet. Each is
    read once, by `build_dataset`."""

    section: DataSection
    train: OpenSources
    evaluation: OpenSources | None

    @property
    def formats(self) -> frozenset[str]:
        """The formats of all sources."""
        return self.train.formats | (self.evaluation.formats if self.evaluation else frozenset())

    @property
    def section_with_format(self) -> DataSection:
        """The section with `format: auto` resolved, where all sources have one format."""
        found = next(iter(self.formats)) if len(self.formats) == 1 else self.section.format
        return self.section.model_copy(update={"format": found})


def open_data(section: DataSection) -> OpenData:
    """Opens all files of a data section. Raises DataError for what is missing, unreadable, empty or of no
    format."""
    has_sources = section.eval is not None and not isinstance(section.eval, float)
    evaluation = OpenSources(section.eval, section) if has_sources else None  # type: ignore[arg-type]
    return OpenData(section, OpenSources(section.train, section), evaluation)


def build_dataset(
    data: DataSection | OpenData,
    tokenizer: PreTrainedTokenizerBase,
    *,
    seed: int,
    stop_ids: Sequence[int] = (),
    vocabulary_size: int | None = None,
    cache: Path | None = None,
) -> tuple[PackedDataset, PackedDataset | None]:
    """Reads, tokenises and packs `data.train` and `data.eval`: (train, eval or None).

    `data.eval` as a share is split off the training examples by content (see `split`); as sources it is read
    with the same format and columns, and examples that are also in train are counted. stop_ids: what the
    model's generation_config.json says ends an answer; empty where it has none. vocabulary_size: rows of the
    model's embedding, where it is known. cache: the folder that holds the token cache; None: nothing is kept.
    Raises DataError for every kind of bad data.
    """
    opened = data if isinstance(data, OpenData) else open_data(data)
    section = opened.section
    chat_format = _chat_format(opened, tokenizer, stop_ids)
    example_tokenizer = ExampleTokenizer(
        tokenizer,
        chat_format,
        sequence_length=section.sequence_length,
        supervise=section.supervise,
        too_long=section.too_long,
        vocabulary_size=vocabulary_size,
    )
    settings = [vocabulary_size, list(stop_ids)]

    def read(sources: OpenSources) -> TokenizedExamples:
        return tokenized_or_kept(sources, example_tokenizer, section, settings, cache)

    def pack(
        examples: TokenizedExamples, side: str, times: np.ndarray, reading: Reading, also: int = 0
    ) -> PackedDataset:
        if not times[examples.document_examples].any():
            raise DataError(f"data.{side}: none of its rows has anything to learn from.")
        return PackedDataset(
            examples,
            sequence_length=section.sequence_length,
            packing=section.packing,
            seed=seed,
            shuffle=side == "train",
            times=times,
            reading=reading,
            num_examples_also_in_train=also,
        )

    examples = read(opened.train)
    keys, facts = examples.example_keys, examples.facts
    is_eval = np.zeros(len(keys), dtype=bool)
    if isinstance(section.eval, float):
        is_eval = split_by_content(keys, section.eval, seed)
    times = chosen_by_weight(keys, np.array(facts.weights)[examples.example_tables], seed)
    said = chat_format.remarks() if chat_format is not None else _pairs_in_words(opened, tokenizer, examples)
    remarks = (*facts.reading.remarks, *_weights_in_words(facts), *said)
    train = pack(examples, "train", np.where(is_eval, 0, times), replace(facts.reading, remarks=remarks))
    if isinstance(section.eval, float):
        return train, pack(examples, "eval", is_eval.astype(np.int64), Reading())
    if opened.evaluation is None:
        return train, None
    others = read(opened.evaluation)
    once = np.ones(others.num_examples, dtype=np.int64)
    num_also = num_also_in(others.example_keys, keys)
    return train, pack(others, "eval", once, others.facts.reading, num_also)


def _chat_format(
    opened: OpenData, tokenizer: PreTrainedTokenizerBase, stop_ids: Sequence[int]
) -> ChatFormat | None:
    """The chat format of the data; None where no example is a conversation."""
    section = opened.section
    if not opened.formats.isdisjoint(CHAT_FORMATS):
        return ChatFormat(
            tokenizer, stop_ids, options=section.chat_template_kwargs, open_thought=section.open_thought
        )
    if section.chat_template_kwargs:
        raise DataError(
            "data.chat_template_kwargs is for conversations, and no row is one: remove it, or use the format "
            "messages, sharegpt or alpaca."
        )
    return None


def _pairs_in_words(
    opened: OpenData, tokenizer: PreTrainedTokenizerBase, examples: TokenizedExamples
) -> list[str]:
    """What it means that pairs of texts do not use the base's chat template. Nothing where most of them hold
    control tokens: people do write templates by hand."""
    names, section = examples.facts.note_names, opened.section
    by_hand = [kind for kind, name in enumerate(names) if name == Note.SAYS_CONTROL_TOKENS]
    is_used = 2 * np.isin(examples.note_kinds, by_hand).sum() > examples.num_examples
    if not tokenizer.chat_template or is_used or "prompt_completion" not in opened.formats:
        return []
    way = "" if section.prompt_template else f"; for chats, set {chats_of_pairs(section.columns)}"
    return [
        "the base has a chat template, which prompts and completions do not use: the model will answer bare "
        f"prompts, and `chat` will not work{way}"
    ]


def _weights_in_words(facts: Facts) -> list[str]:
    return [
        f"{name}: weight {weight:g}, its rows are seen {weight:g} times an epoch on average"
        for (name, _), weight in zip(facts.tables, facts.weights, strict=True)
        if weight != 1
    ]
