"""Batches made ahead: the same bytes in the same order, one step ahead, errors at the step they belong to."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from dataclasses import fields, is_dataclass
from typing import Any

import numpy as np
import pytest
import torch
from tiny_data import packed
from torch import Tensor

from qlora_train.data.documents import Document
from qlora_train.device.compute import THE_CPU as CPU
from qlora_train.micro_batch import MicroBatch
from qlora_train.model.packed_tokens import PackedTokens
from qlora_train.train.batches import BatchPrefetcher
from qlora_train.weights.host_memory import HostMemory
from qlora_train.weights.uploads import Uploads

UPLOADS = Uploads(CPU, HostMemory(CPU))


class Maker:
    """Two micro-batches a step; counts, and says when a step has been made."""

    def __init__(self, fails_at: int | None = None) -> None:
        rng = np.random.default_rng(0)
        documents = []
        for length in (20, 7, 31, 12, 25, 9, 16, 30):
            tokens = rng.integers(3, 90, length).astype(np.int32)
            documents.append(Document(tokens, np.arange(length) > 2))
        self.data = packed(documents, length=32, packing=True, seed=1, shuffle=True)
        self.made: list[int] = []
        self.threads: set[str] = set()
        self._fails_at, self._changed = fails_at, threading.Condition()

    def __call__(self, step: int) -> list[MicroBatch]:
        with self._changed:
            self.made.append(step)
            self.threads.add(threading.current_thread().name)
            self._changed.notify_all()
        if step == self._fails_at:
            raise ValueError(f"row {step} is broken")
        return [self.data.micro_batch([2 * step, 2 * step + 1]), self.data.micro_batch([None, 3])]

    def wait_for(self, step: int) -> None:
        with self._changed:
            assert self._changed.wait_for(lambda: step in self.made, timeout=60)


def leaves(value: Any) -> Iterator[Any]:
    """Tensors, arrays and integers of a PackedTokens, in order."""
    if is_dataclass(value):
        value = [getattr(value, f.name) for f in fields(value)]
    if isinstance(value, list | tuple):
        for item in value:
            yield from leaves(item)
    else:
        yield value


def are_equal(left: PackedTokens, right: PackedTokens) -> bool:
    ours, theirs = list(leaves(left)), list(leaves(right))
    assert len(ours) > 10
    return len(ours) == len(theirs) and all(same(a, b) for a, b in zip(ours, theirs, strict=True))


def same(left: Any, right: Any) -> bool:
    if isinstance(left, Tensor):
        return left.dtype == right.dtype and torch.equal(left, right)
    return type(left) is type(right) and np.array_equal(left, right)


def worker_threads() -> list[threading.Thread]:
    return [t for t in threading.enumerate() if t.name.startswith("qlora_train-batches")]


def test_the_same_bytes_in_order_from_any_first_step() -> None:
    maker = Maker()
    with BatchPrefetcher(maker, range(3, 8), CPU, UPLOADS) as batches:
        for step in range(3, 8):
            taken = batches.take(step)
            made = Maker()(step)
            assert len(taken) == 2
            assert all(
                are_equal(t, PackedTokens.from_host(m, "cpu")) for t, m in zip(taken, made, strict=True)
            )
            assert not are_equal(taken[0], PackedTokens.from_host(Maker()(step + 1)[0], "cpu"))
    assert maker.made == [3, 4, 5, 6, 7]
    assert len(maker.threads) == 1 and threading.current_thread().name not in maker.threads


def test_one_step_is_made_ahead_while_the_caller_works() -> None:
    maker = Maker()
    with BatchPrefetcher(maker, range(1, 10), CPU, UPLOADS) as batches:
        maker.wait_for(1)
        batches.take(1)
        maker.wait_for(2)
        batches.take(2)
        maker.wait_for(3)
    assert maker.made == [1, 2, 3]  # and no more, though there was time until the thread had ended
    assert not worker_threads()


def test_an_error_comes_at_its_step_and_the_thread_ends() -> None:
    maker = Maker(fails_at=3)
    with (
        pytest.raises(ValueError, match="row 3 is broken"),
        BatchPrefetcher(maker, range(1, 10), CPU, UPLOADS) as batches,
    ):
        for step in (1, 2):
            batches.take(step)
        maker.wait_for(3)
        batches.take(3)
    assert maker.made == [1, 2, 3]
    assert not worker_threads()


def test_nothing_to_take_makes_nothing() -> None:
    maker = Maker()
    with BatchPrefetcher(maker, range(8, 8), CPU, UPLOADS):
        pass
    assert maker.made == [] and not worker_threads()


def test_an_early_end_leaves_no_thread() -> None:
    with pytest.raises(KeyboardInterrupt), BatchPrefetcher(Maker(), range(1, 100), CPU, UPLOADS) as batches:
        batches.take(1)
        raise KeyboardInterrupt
    assert not worker_threads()
