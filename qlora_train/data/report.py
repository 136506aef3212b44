"""What became of the examples, in numbers: nothing is cut, split or left out without being counted here."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field

from qlora_train.data.notes import Note
from qlora_train.data.tables import listed


@dataclass(frozen=True)
class Reading:
    """The fate of examples before they were tokens. `skipped`: the first few that could not be used, in
    words; `remarks`: how files were read, where that may surprise."""

    num_empty: int = 0
    num_rejected: int = 0
    num_skipped: int = 0
    skipped: tuple[str, ...] = ()
    unread_columns: tuple[str, ...] = ()
    remarks: tuple[str, ...] = ()

    def lines(self) -> list[str]:
        lines = list(self.remarks)
        if self.unread_columns:
            lines.append(f"columns not read: {listed(self.unread_columns)}")
        if self.num_empty:
            lines.append(f"{_rows(self.num_empty)} empty, skipped")
        if self.num_rejected:
            lines.append(f"{_rows(self.num_rejected)} labelled as bad answers, left out")
        if self.num_skipped:
            more = self.num_skipped - len(self.skipped)
            named = [*self.skipped, *([f"... and {more:,} more"] if more else [])]
            lines.append(f"{_rows(self.num_skipped)} skipped (data.on_bad_row: skip):")
            lines += [f"  {problem}" for problem in named]
        return lines


@dataclass(frozen=True)
class DatasetReport:
    """One side (train or eval) of the data: examples, tokens and bins.

    `notes`: examples per note; `amounts`: their amounts, summed. `num_examples_also_in_train`: of an
    evaluation side. `num_left_in`: examples whose source has a weight below 1 and that are not among the
    chosen.
    """

    num_examples: int
    num_documents: int
    num_tokens: int
    num_supervised: int
    num_bins: int
    sequence_length: int
    packing: bool = True
    notes: Mapping[str, int] = field(default_factory=Counter)
    amounts: Mapping[str, int] = field(default_factory=Counter)
    reading: Reading = Reading()
    num_examples_also_in_train: int = 0

    @property
    def filling(self) -> float:
        """Share of the bins' tokens that are not padding."""
        return self.num_tokens / (self.num_bins * self.sequence_length)

    @property
    def supervised_share(self) -> float:
        return self.num_supervised / self.num_tokens

    def lines(self) -> list[str]:
        """Lines for the log: two always, more for each thing that was cut, split, left out, not read or
        seen twice.
        """
        return [
            f"{_rows(self.num_examples)} -> {_many(self.num_documents, 'document')}, {self.num_tokens:,} "
            f"tokens, {self.num_supervised:,} supervised ({self.supervised_share:.1%})",
            self._bins_line(),
            *self.reading.lines(),
            *self._note_lines(),
        ]

    def _bins_line(self) -> str:
        bins = _many(self.num_bins, "bin")
        if self.packing:
            return f"{bins} of {self.sequence_length:,} tokens, {self.filling:.1%} full"
        mean = self.num_tokens / self.num_bins
        return f"{bins} of one document each (packing: false), {mean:,.0f} tokens on average"

    def _more_tokens(self, note: str) -> str:
        if note != Note.SEVERAL_TEXTS:
            return ""
        return f": {self.num_tokens / (self.num_tokens - self.amounts[note]):.2f} times the tokens"

    def _dropped_line(self, num_rows: int, num_tokens: int) -> str:
        """About rows that `data.too_long: drop` leaves out: a warning where they are much of the data."""
        line = f"{_rows(num_rows)} longer than sequence_length left out ({num_tokens:,} tokens"
        of_rows, of_tokens = num_rows / self.num_examples, num_tokens / (self.num_tokens + num_tokens)
        if max(of_rows, of_tokens) < _MUCH:
            return f"{line})"
        return (
            f"warning: {line}): {of_rows:.0%} of the rows, {of_tokens:.0%} of the tokens. Raise "
            "data.sequence_length, or set data.too_long: cut or split"
        )

    def _note_lines(self) -> list[str]:
        rows, amounts = Counter(self.notes), Counter(self.amounts)
        lines = []
        cut = rows[Note.PROMPT_CUT] or rows[Note.ANSWER_CUT]
        if cut or rows[Note.SPLIT]:
            lost = amounts[Note.PROMPT_CUT] + amounts[Note.ANSWER_CUT]
            share = lost / (self.num_tokens + lost)
            line = (
                f"longer than sequence_length: {_rows(rows[Note.PROMPT_CUT])} lost the beginning of the "
                f"prompt, {rows[Note.ANSWER_CUT]:,} the end of the answers ({lost:,} tokens, {share:.1%} of "
                f"all); {rows[Note.SPLIT]:,} split into {amounts[Note.SPLIT]:,} documents"
            )
            lines.append(line if share < _MUCH else f"warning: {line}. Raise data.sequence_length")
        if num_dropped := rows[Note.TOO_LONG]:
            lines.append(self._dropped_line(num_dropped, amounts[Note.TOO_LONG]))
        if rows[Note.UNSUPERVISED]:
            lines.append(f"{_rows(rows[Note.UNSUPERVISED])} without a supervised token left out")
        others = sorted(note for note in rows if rows[note] and note not in _SAID_TOGETHER)
        lines += [f"{_said_of(rows[note], note)}{self._more_tokens(note)}" for note in others]
        if also := self.num_examples_also_in_train:
            lines.append(f"{_many(also, 'evaluation row')} also in train, word for word")
        return lines


_MUCH = 0.1
"""The share of rows or tokens that nobody leaves out without being warned."""
_SAID_TOGETHER = frozenset({Note.PROMPT_CUT, Note.ANSWER_CUT, Note.SPLIT, Note.TOO_LONG, Note.UNSUPERVISED})
_OF_ONE = {"have": "has", "are": "is"}


def _rows(number: int) -> str:
    return _many(number, "row")


def _many(number: int, what: str) -> str:
    return f"{number:,} {what}{'s' if number != 1 else ''}"


def _said_of(number: int, note: str) -> str:
    """The note, which begins with a verb in the plural, behind a number of rows."""
    verb, _, rest = note.partition(" ")
    return f"{_rows(number)} {note}" if number != 1 else f"1 row {_OF_ONE.get(verb, verb + 's')} {rest}"
