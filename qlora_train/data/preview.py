"""Shows what the model will see: the first rows' tokens, supervised ones marked, and what packing makes.

On a terminal supervised text is green and underlined, special tokens are reversed; piped into a file (or
without colours) supervised text stands in [[ ... ]]. Look here first when a loss does not fall.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import groupby
from typing import TYPE_CHECKING

from rich.console import Console
from rich.text import Text

from qlora_train.data.dataset import PackedDataset, build_dataset
from qlora_train.data.tokenization import Document
from qlora_train.data.tokenizer import load_tokenizer, read_stop_ids

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from qlora_train.recipe import Recipe

_SUPERVISED = "bold underline green"
_OPEN, _CLOSE = "[[", "]]"


def preview(recipe: Recipe, num_rows: int, console: Console | None = None) -> None:
    """Prints the documents of the first `num_rows` training rows and the report of all. Loads no weights.

    Raises BaseModelError for the tokenizer and DataError for the data, like training would.
    """
    console = console or Console(soft_wrap=True)
    model = recipe.model
    tokenizer = load_tokenizer(model.base, model.revision, model.chat_template)
    train, evaluation = build_dataset(
        recipe.data,
        tokenizer,
        seed=recipe.training.seed,
        stop_ids=read_stop_ids(model.base, model.revision),
    )
    for document, title in _first_rows(train, num_rows):
        console.rule(Text(title), align="left")
        console.print(as_text(document, tokenizer, marked=not console.color_system))
        console.print(f"{len(document):,} tokens, {document.num_supervised:,} supervised", style="dim")
    for name, dataset in (("train", train), ("eval", evaluation)):
        if dataset is not None:
            console.rule(name, align="left")
            for line in dataset.report.lines():
                console.print(line, highlight=False, markup=False)


def _first_rows(dataset: PackedDataset, num_rows: int) -> Iterator[tuple[Document, str]]:
    """Documents of the first rows, in the order of the data, each with the place it is from."""
    rows = groupby(zip(dataset.documents, dataset.origins, strict=True), key=lambda pair: pair[1])
    for _, (origin, pairs) in zip(range(num_rows), rows, strict=False):
        pieces = [document for document, _ in pairs]
        for number, document in enumerate(pieces, start=1):
            part = f" (part {number} of {len(pieces)})" if len(pieces) > 1 else ""
            yield document, origin.describe() + part


def as_text(document: Document, tokenizer: PreTrainedTokenizerBase, *, marked: bool) -> Text:
    """The document's text, special tokens included; `marked` puts supervised runs into [[ ]] besides the
    style.
    """
    special_ids = {*tokenizer.all_special_ids, *tokenizer.added_tokens_decoder}
    kinds = [
        (bool(supervised), token_id in special_ids)
        for token_id, supervised in zip(document.token_ids.tolist(), document.supervised, strict=True)
    ]
    text = Text()
    for supervised, run in groupby(range(len(document)), key=lambda i: kinds[i][0]):
        text.append(_OPEN if marked and supervised else "")
        for is_special, tokens in groupby(run, key=lambda i: kinds[i][1]):
            style = f"{_SUPERVISED if supervised else ''} {'reverse' if is_special else ''}".strip()
            ids = document.token_ids[list(tokens)].tolist()
            decoded = tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False)
            text.append(str(decoded), style=style)
        text.append(_CLOSE if marked and supervised else "")
    return text
