"""Shows what the model will see: the first examples' tokens, supervised ones marked, and what the data are
like.

On a terminal supervised text is green and underlined, special tokens (the stop token is one) are reversed,
and every other token has a darker ground, so that each can be told from its neighbours; piped into a file (or
without colours) supervised text stands in [[ ... ]]. Look here first when a loss does not fall.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import groupby
from pathlib import Path
from typing import TYPE_CHECKING

from rich.console import Console
from rich.text import Text

from qlora_train.data.building import build_dataset
from qlora_train.data.dataset import PackedDataset
from qlora_train.data.documents import Document
from qlora_train.data.statistics import (
    length_advice,
    length_lines,
    lengths_of,
    num_duplicates,
    packing_line,
    steps_advice,
    steps_line,
    stop_tokens,
)
from qlora_train.data.tokenizer import read_stop_ids, tokenizer_of_run
from qlora_train.terminal_text import message, printable

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from qlora_train.recipe import Recipe

_SUPERVISED = "bold underline green"
_EVERY_OTHER = "on grey19"
_OPEN, _CLOSE = "[[", "]]"
_CONTEXT_TOKENS = 4  # tokens that a token is decoded behind
_CUT_OFF = "\ufffd"  # what the bytes of half a character decode to


def preview(
    recipe: Recipe,
    num_examples: int,
    console: Console | None = None,
    *,
    vocabulary_size: int | None = None,
    cache: Path | None = None,
    remarks: Sequence[str] = (),
) -> None:
    """Prints the documents of the first `num_examples` training examples and what all examples are like.

    Loads no weights.

    vocabulary_size: rows of the model's embedding, where it is known. cache: the folder that holds the token
    cache, which training will read. remarks: about the model, to be said with the rest. Raises BaseModelError
    for the tokenizer and DataError for the data, like training would.
    """
    console = console or Console(soft_wrap=True)
    model = recipe.model
    tokenizer, added = tokenizer_of_run(model, model.base, model.revision)
    train, evaluation = build_dataset(
        recipe.data,
        tokenizer,
        seed=recipe.training.seed,
        stop_ids=read_stop_ids(model.base, model.revision),
        vocabulary_size=vocabulary_size and added.vocabulary_size(vocabulary_size),
        cache=cache,
    )
    for document, title in _first_examples(train, num_examples):
        console.print(Text(f"── {message(title)}", style="bold"))
        console.print(as_text(document, tokenizer, marked=not console.color_system))
        console.print(f"{len(document):,} tokens, {document.num_supervised:,} supervised", style="dim")
    for name, dataset in (("train", train), ("eval", evaluation)):
        if dataset is not None:
            console.print(Text(f"── {name}", style="bold"))
            for line in _lines(dataset, tokenizer):
                console.print(message(line), highlight=False, markup=False)
    advice = [*length_advice(train), *steps_advice(train, recipe.training)]
    for line in (steps_line(train, recipe.training), *advice, *remarks, *added.remarks):
        console.print(message(line), highlight=False, markup=False)


def _lines(dataset: PackedDataset, tokenizer: PreTrainedTokenizerBase) -> list[str]:
    duplicates = num_duplicates(dataset)
    repeated = (
        f"{duplicates:,} row{' says' if duplicates == 1 else 's say'} word for word what another one says"
    )
    return [
        *dataset.report.lines(),
        *([repeated] if duplicates else []),
        stop_tokens(dataset, tokenizer),
        packing_line(dataset),
        *length_lines(lengths_of(dataset)),
    ]


def _first_examples(dataset: PackedDataset, num_examples: int) -> Iterator[tuple[Document, str]]:
    """Documents of the first examples, in the order of the data, each with the place it is from."""
    examples = groupby(range(len(dataset.lengths)), key=dataset.example_of)
    for _, (example, indices) in zip(range(num_examples), examples, strict=False):
        pieces = [dataset.document(index) for index in indices]
        for number, document in enumerate(pieces, start=1):
            part = f" (part {number} of {len(pieces)})" if len(pieces) > 1 else ""
            yield document, dataset.examples.describe_example(example) + part


def as_text(document: Document, tokenizer: PreTrainedTokenizerBase, *, marked: bool) -> Text:
    """The document's text, special tokens included; `marked` puts supervised runs into [[ ]] in the place of
    colours.
    """
    special_ids = {*tokenizer.all_special_ids, *tokenizer.added_tokens_decoder}
    kinds = [
        (bool(supervised), token_id in special_ids)
        for token_id, supervised in zip(document.token_ids.tolist(), document.supervised, strict=True)
    ]
    text = Text()
    number = 0
    for supervised, run in groupby(range(len(document)), key=lambda i: kinds[i][0]):
        text.append(_OPEN if marked and supervised else "")
        for is_special, tokens in groupby(run, key=lambda i: kinds[i][1]):
            style = f"{_SUPERVISED if supervised else ''} {'reverse' if is_special else ''}".strip()
            ids = document.token_ids[list(tokens)].tolist()
            for piece in [_decoded(tokenizer, ids)] if marked else _pieces(tokenizer, ids):
                number += 1
                ground = _EVERY_OTHER if number % 2 and not is_special and not marked else ""
                text.append(printable(piece), style=f"{style} {ground}".strip())
        text.append(_CLOSE if marked and supervised else "")
    return text


def _pieces(tokenizer: PreTrainedTokenizerBase, token_ids: Sequence[int]) -> Iterator[str]:
    """The text of each token behind those before it; tokens that share a character are one piece."""
    shown = 0
    for end in range(1, len(token_ids) + 1):
        first = max(shown - _CONTEXT_TOKENS, 0)
        before = _decoded(tokenizer, token_ids[first:shown])
        text = _decoded(tokenizer, token_ids[first:end])
        if end == len(token_ids) or not text.endswith(_CUT_OFF):
            yield text.removeprefix(before)
            shown = end


def _decoded(tokenizer: PreTrainedTokenizerBase, token_ids: Sequence[int]) -> str:
    return str(
        tokenizer.decode(list(token_ids), skip_special_tokens=False, clean_up_tokenization_spaces=False)
    )
