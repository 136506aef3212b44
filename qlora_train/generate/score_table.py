"""The scores of models as text."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

_LEAST_WIDTH = 14


def score_table(title: str, models: Sequence[str], rows: Mapping[str, Sequence[str]]) -> str:
    """A title, and a column for each model. rows: by label, a cell for each model."""
    label_width = max([_LEAST_WIDTH, *(len(label) + 1 for label in rows)])
    width = max([_LEAST_WIDTH, *(len(cell) + 2 for cells in rows.values() for cell in cells)])
    lines = [title, " " * label_width + "".join(f"{model:>{width}}" for model in models)]
    lines += [
        f"{label:<{label_width}}" + "".join(f"{cell:>{width}}" for cell in cells)
        for label, cells in rows.items()
    ]
    return "\n".join(lines) + "\n"
