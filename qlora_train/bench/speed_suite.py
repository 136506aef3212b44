"""The speed cases: the same base, data, rank, optimizer and tokens for us and for peers."""

from __future__ import annotations

from qlora_train.bench.case import Case

CASES: tuple[Case, ...] = ()
