"""What became of the rows, in numbers: nothing is cut, split or left out without being counted here."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from qlora_train.data.chat import ChatNote


@dataclass(frozen=True)
class TokenCounts:
    """What tokenising did. `num_overlong_rows` were longer than sequence_length; each is then in one or
    more of the three lines behind it (a cut answer's prompt was cut first)."""

    num_rows: int = 0
    num_documents: int = 0
    num_tokens: int = 0
    num_supervised: int = 0
    num_overlong_rows: int = 0
    num_prompts_cut: int = 0
    num_answers_cut: int = 0
    num_texts_split: int = 0
    num_tokens_cut: int = 0
    num_rows_saying_control_tokens: int = 0  # the text of special tokens, read as these tokens
    num_rows_quoting_control_tokens: int = 0  # the same, read as text
    num_unsupervised_rows: int = 0  # left out: they have no token to learn from


@dataclass(frozen=True)
class DatasetReport:
    """One side (train or eval) of the data: tokens and bins. `num_rows_also_in_train` is 0 for train
    itself. `notes`: what happened to rows, by how many; `amounts`: how much of it. `remarks`: about all rows.
    """

    tokens: TokenCounts
    num_bins: int
    sequence_length: int
    num_rows_also_in_train: int = 0
    notes: Mapping[str, int] = field(default_factory=dict)
    amounts: Mapping[str, int] = field(default_factory=dict)
    remarks: tuple[str, ...] = ()

    @property
    def filling(self) -> float:
        """Share of the bins' tokens that are not padding."""
        return self.tokens.num_tokens / (self.num_bins * self.sequence_length)

    @property
    def supervised_share(self) -> float:
        return self.tokens.num_supervised / self.tokens.num_tokens

    def lines(self) -> list[str]:
        """For the log: two lines always, one more for each thing that was cut, split, left out or seen
        twice.
        """
        counts = self.tokens
        lines = [
            f"{counts.num_rows:,} rows -> {counts.num_documents:,} documents, {counts.num_tokens:,} tokens, "
            f"{counts.num_supervised:,} supervised ({self.supervised_share:.1%})",
            f"{self.num_bins:,} bins of {self.sequence_length:,} tokens, {self.filling:.1%} full",
        ]
        if counts.num_overlong_rows:
            lines.append(
                f"{counts.num_overlong_rows:,} rows longer than sequence_length: {counts.num_prompts_cut:,} "
                f"prompts cut on the left, {counts.num_answers_cut:,} answers cut at the end "
                f"({counts.num_tokens_cut:,} tokens lost), {counts.num_texts_split:,} texts split"
            )
        if counts.num_unsupervised_rows:
            lines.append(f"{counts.num_unsupervised_rows:,} rows without a supervised token left out")
        lines += [*self.remarks, *self._note_lines()]
        if counts.num_rows_quoting_control_tokens:
            lines.append(
                f"{counts.num_rows_quoting_control_tokens:,} conversations hold the text of special tokens, "
                "read as plain text"
            )
        if counts.num_rows_saying_control_tokens:
            lines.append(
                f"{counts.num_rows_saying_control_tokens:,} rows hold the text of special tokens, read as "
                "these tokens"
            )
        if self.num_rows_also_in_train:
            lines.append(
                f"{self.num_rows_also_in_train:,} evaluation rows are also training rows, word for word"
            )
        return lines

    def _note_lines(self) -> list[str]:
        lines = []
        for note, number in self.notes.items():
            line = f"{number:,} row{'s' if number != 1 else ''} {note}"
            if note == ChatNote.SEVERAL_TEXTS:
                more = self.amounts[note]
                line += f": {self.tokens.num_tokens / (self.tokens.num_tokens - more):.2f} times the tokens"
            lines.append(line)
        return lines
