"""Trimming happens when the process has grown, and not before."""

from __future__ import annotations

from types import SimpleNamespace

from qlora_train.weights.heap import GROWTH_BYTES, HeapTrimmer


def test_it_trims_when_the_process_has_grown_since_the_last_time() -> None:
    trimmer, sizes, trims = HeapTrimmer(), [0], []
    trimmer._process = SimpleNamespace(memory_info=lambda: SimpleNamespace(rss=sizes[-1]))  # type: ignore[assignment]

    def trim(keep: int) -> None:
        trims.append(keep)
        sizes.append(sizes[-1] - 5)  # a little comes back

    trimmer._trim = trim
    for grown, num_trims in [
        (GROWTH_BYTES - 1, 0),
        (GROWTH_BYTES, 1),
        (2 * GROWTH_BYTES - 6, 1),  # measured from what was left after the trim
        (2 * GROWTH_BYTES - 5, 2),
    ]:
        sizes.append(grown)
        trimmer.trim_if_grown()
        assert len(trims) == num_trims


def test_without_glibc_nothing_happens() -> None:
    trimmer = HeapTrimmer()
    trimmer._trim = None
    trimmer.trim_if_grown()
