"""The ring: what is in its slots when, how often it reads, and what happens when reading fails."""

from __future__ import annotations

import random
import threading
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager

import pytest
import torch
from torch import Tensor

from qlora_train.device.compute import THE_CPU as CPU
from qlora_train.weights.ring import Ring

SLOT_BYTES = 97
PATIENCE_S = 120  # for what must happen; only a failing test waits so long
POISON = torch.full((SLOT_BYTES,), 0xFF, dtype=torch.uint8)


class DiskError(Exception):
    """What a fake reader raises."""


def content(item: int) -> Tensor:
    """What an item consists of: its own size, no byte like the poison."""
    num_bytes = SLOT_BYTES - item % 7
    return ((torch.arange(num_bytes) * 31 + item * 53) % 251).to(torch.uint8)


class Reader:
    """Copies `content`, in two halves with a pause between them; notes what it was asked for.

    delays: a generator of pauses of up to 1 ms, None for none. failures: item -> how many of its reads fail,
    half done.
    """

    def __init__(self, delays: random.Random | None = None, failures: dict[int, float] | None = None) -> None:
        self.asked: list[int] = []
        self._delays, self.failures = delays, failures or {}
        self._never = threading.Event()

    def read(self, item: int, slot: Tensor) -> None:
        self.asked.append(item)
        part, half = content(item), SLOT_BYTES // 2
        slot[:half] = part[:half]
        if self._delays is not None and self._delays.random() < 0.5:
            self._never.wait(self._delays.random() * 1e-3)
        if self.failures.get(item, 0) > 0:
            self.failures[item] -= 1
            raise DiskError(f"item {item}")
        slot[half : len(part)] = part[half:]


class GatedReader(Reader):
    """Every read waits at the gate before it writes a byte."""

    def __init__(self) -> None:
        super().__init__()
        self.gate = threading.Semaphore(0)
        self.at_the_gate = threading.Semaphore(0)

    def read(self, item: int, slot: Tensor) -> None:
        self.at_the_gate.release()
        assert self.gate.acquire(timeout=PATIENCE_S)
        super().read(item, slot)


def present_in(ring: Ring) -> set[int]:
    """Items in slots, or on their way there."""
    return set(ring._slot_of)


@contextmanager
def ring_of(reader: Reader, num_slots: int, *, poison: bool = True) -> Iterator[Ring]:
    ring = Ring(reader, num_slots, SLOT_BYTES, CPU, poison=poison)
    try:
        yield ring
    finally:
        if isinstance(reader, GatedReader):
            reader.gate.release(1000)
        ring.close()


def read_all(ring: Ring) -> None:
    """Wait until the worker has done all that was asked of it so far."""
    ring._worker.submit(lambda: None).result(PATIENCE_S)


def use(ring: Ring, item: int) -> Tensor:
    """Acquire and release; the bytes as they were in between."""
    _, slot = ring.acquire(item)
    seen = slot.clone()
    ring.release(item)
    return seen


def next_different(order: Sequence[int], num_slots: int) -> set[int]:
    """The rule, written in another way than the ring's."""
    for length in range(len(order) + 1):
        if len(set(order[:length])) > num_slots:
            return set(order[: length - 1])
    return set(order)


def reads_by_the_rule(order: Sequence[int], num_slots: int, present: Iterable[int] = ()) -> int:
    """Reads of one announced order: what enters the window and was not there."""
    before, count = set(present), 0
    for start in range(len(order)):
        window = next_different(order[start:], num_slots)
        count += len(window - before)
        before = window
    return count


def fewest_reads(order: Sequence[int], num_slots: int) -> int:
    """Belady's optimum for a cache that looks at nothing ahead but what to evict."""
    present: set[int] = set()
    count = 0
    for start, item in enumerate(order):
        if item in present:
            continue
        count += 1
        if len(present) == num_slots:
            later = order[start:]
            present.remove(max(present, key=lambda i: later.index(i) if i in later else len(later)))
        present.add(item)
    return count


def zigzag(num_layers: int) -> list[int]:
    return [*range(num_layers), *reversed(range(num_layers))]


def random_orders(count: int, seed: int) -> Iterator[tuple[list[int], int, random.Random]]:
    """(order, number of slots, generator): short and long, with repetitions, many items or few."""
    rng = random.Random(seed)
    for _ in range(count):
        num_items = rng.randint(1, 9)
        order = [rng.randrange(num_items) for _ in range(rng.randint(1, 25))]
        yield order, rng.randint(1, 5), rng


def test_slots_hold_the_next_different_items_and_reads_follow_from_that() -> None:
    for order, num_slots, rng in random_orders(60, seed=1):
        reader = Reader(rng)
        with ring_of(reader, num_slots) as ring:
            ring.set_schedule(order)
            for start, item in enumerate(order):
                assert next_different(order[start:], num_slots) <= present_in(ring)
                assert len(present_in(ring)) <= num_slots
                ring.acquire(item)
                assert next_different(order[start:], num_slots) <= present_in(ring)
                ring.release(item)
            read_all(ring)
        assert ring.num_reads == len(reader.asked) == reads_by_the_rule(order, num_slots), (order, num_slots)
        assert ring.num_reads >= fewest_reads(order, num_slots)


@pytest.mark.parametrize("num_slots", [1, 2, 3, 7, 9])
@pytest.mark.parametrize("num_passes", [1, 3])
def test_a_zigzag_reads_nothing_again_at_its_turns(num_slots: int, num_passes: int) -> None:
    num_layers = 7
    order = zigzag(num_layers) * num_passes
    with ring_of(Reader(), num_slots) as ring:
        ring.set_schedule(order)
        for item in order:
            use(ring, item)
    there = min(num_slots, num_layers)
    turns = 2 * num_passes - 1
    assert ring.num_reads == 2 * num_layers * num_passes - turns * there
    assert ring.num_reads == fewest_reads(order, num_slots)  # nobody could read less


def test_whoever_acquires_sees_exactly_the_item() -> None:
    for order, num_slots, rng in random_orders(80, seed=2):
        with ring_of(Reader(rng), num_slots) as ring:
            ring.set_schedule(order)
            for item in order:
                part = content(item)
                assert torch.equal(use(ring, item)[: len(part)], part), (order, num_slots, item)


def test_whoever_looks_later_sees_poison_or_another_item() -> None:
    num_gone = 0
    for order, num_slots, rng in random_orders(40, seed=3):
        with ring_of(Reader(rng), num_slots) as ring:
            ring.set_schedule(order)
            kept: dict[int, Tensor] = {}  # item -> the slot it was last used in
            for item in order:
                kept[item] = ring.acquire(item)[1]
                ring.release(item)
                read_all(ring)
                for gone in kept.keys() - present_in(ring):
                    seen = kept[gone]
                    others = [i for i in present_in(ring) if torch.equal(seen[: len(content(i))], content(i))]
                    assert torch.equal(seen, POISON) or others
                    assert not torch.equal(seen[: len(content(gone))], content(gone))
                    num_gone += 1
    assert num_gone > 100


def test_a_slot_is_poison_from_the_moment_its_item_goes() -> None:
    reader = GatedReader()
    with ring_of(reader, num_slots=1) as ring:
        ring.set_schedule([4, 5])
        assert reader.at_the_gate.acquire(timeout=PATIENCE_S)
        assert torch.equal(ring._slots[0], POISON)  # before its first item too
        reader.gate.release()
        _, slot = ring.acquire(4)
        ring.release(4)  # 5 is asked for, in the same slot
        assert reader.at_the_gate.acquire(timeout=PATIENCE_S)  # and stands at the gate
        assert torch.equal(slot, POISON)
        reader.gate.release()
        part = content(5)
        seen = use(ring, 5)
        assert torch.equal(seen[: len(part)], part) and torch.equal(seen[len(part) :], POISON[len(part) :])


def test_half_an_item_is_poison() -> None:
    with ring_of(Reader(failures={4: 1}), num_slots=1) as ring:
        ring.set_schedule([4])
        with pytest.raises(DiskError):
            ring.acquire(4)
        read_all(ring)
        assert torch.equal(ring._slots[0], POISON)


def test_acquire_waits_for_the_whole_item() -> None:
    reader = GatedReader()
    with ring_of(reader, num_slots=2) as ring:
        ring.set_schedule([1, 2])
        seen: list[Tensor] = []
        user = threading.Thread(target=lambda: seen.append(use(ring, 1)))
        user.start()
        assert reader.at_the_gate.acquire(timeout=PATIENCE_S)
        user.join(0.02)
        assert seen == []
        reader.gate.release()
        user.join(PATIENCE_S)
        part = content(1)
        assert torch.equal(seen[0][: len(part)], part)


def test_it_reads_ahead_while_an_item_is_in_use() -> None:
    reader = Reader()
    with ring_of(reader, num_slots=3) as ring:
        ring.set_schedule(zigzag(6))
        ring.acquire(0)
        read_all(ring)
        assert reader.asked == [0, 1, 2]
        ring.release(0)
        read_all(ring)
        assert reader.asked == [0, 1, 2, 3]  # announced first, read first


def test_a_new_order_in_the_middle_of_reads() -> None:
    """What both orders want is not read twice, also if it is only on its way."""
    reader = GatedReader()
    with ring_of(reader, num_slots=3) as ring:
        ring.set_schedule([0, 1, 2, 3])
        assert reader.at_the_gate.acquire(timeout=PATIENCE_S)  # 0 is being read, 1 and 2 are to come
        ring.set_schedule([5, 2, 6, 5])
        assert present_in(ring) == {5, 2, 6}
        ring.set_schedule([])
        ring.set_schedule([2, 7])
        reader.gate.release(1000)
        for item in (2, 7):
            part = content(item)
            assert torch.equal(use(ring, item)[: len(part)], part)
        read_all(ring)
        assert reader.asked.count(2) == 1
        assert ring.num_reads == len(reader.asked)


def test_many_replaced_orders() -> None:
    rng = random.Random(4)
    for num_slots in (1, 2, 4):
        with ring_of(Reader(rng), num_slots) as ring:
            for order, _, _ in random_orders(40, seed=num_slots):
                present = present_in(ring)
                before = ring.num_reads
                ring.set_schedule(order)
                stop = rng.randint(0, len(order))
                for item in order[:stop]:
                    part = content(item)
                    assert torch.equal(use(ring, item)[: len(part)], part)
                    assert len(present_in(ring)) <= num_slots
                if stop == len(order):
                    assert ring.num_reads - before == reads_by_the_rule(order, num_slots, present)


@pytest.mark.parametrize("failing", [0, 2, 4])
@pytest.mark.parametrize("num_slots", [1, 2, 3])
def test_a_read_that_fails_once_can_be_asked_for_again(num_slots: int, failing: int) -> None:
    reader = Reader(random.Random(5), {failing: 1})
    order = zigzag(5)
    failures = 0
    with ring_of(reader, num_slots) as ring:
        ring.set_schedule(order)
        for item in order:
            try:
                seen = use(ring, item)
            except DiskError as error:
                assert str(error) == f"item {failing}" and item == failing
                failures += 1
                seen = use(ring, item)  # still the next of the order
            assert torch.equal(seen[: len(content(item))], content(item))
    assert failures == 1
    assert ring.num_reads == 1 + reads_by_the_rule(order, num_slots)


def test_a_read_that_fails_for_good_fails_every_time_and_stops_nothing_else() -> None:
    with ring_of(Reader(failures={1: float("inf")}), num_slots=2) as ring:
        ring.set_schedule([0, 1, 2])
        use(ring, 0)
        for _ in range(3):
            with pytest.raises(DiskError, match="item 1"):
                ring.acquire(1)
        ring.set_schedule([2, 3, 2])
        for item in (2, 3, 2):
            assert torch.equal(use(ring, item)[: len(content(item))], content(item))


def test_a_failure_that_nobody_asks_for_is_nobodys() -> None:
    with ring_of(Reader(failures={1: 1}), num_slots=2) as ring:
        ring.set_schedule([0, 1])
        read_all(ring)
        ring.set_schedule([3, 4])  # 1 has failed, and goes unused
        use(ring, 3)
        use(ring, 4)
        ring.set_schedule([1])
        assert torch.equal(use(ring, 1)[: len(content(1))], content(1))


def test_uses_out_of_turn_are_our_own_mistakes() -> None:
    with ring_of(Reader(), num_slots=2) as ring:
        ring.set_schedule([0, 1])
        with pytest.raises(AssertionError):
            ring.acquire(1)
        ring.acquire(0)
        with pytest.raises(AssertionError):
            ring.acquire(1)
        with pytest.raises(AssertionError):
            ring.release(1)
        with pytest.raises(AssertionError):
            ring.set_schedule([1])
        ring.release(0)
        use(ring, 1)
        with pytest.raises(AssertionError):
            ring.acquire(1)  # the order has ended


def ring_threads() -> set[threading.Thread]:
    return {thread for thread in threading.enumerate() if thread.name.startswith("qlora_train-ring")}


@pytest.mark.parametrize("failures", [{}, {0: 1}, {1: float("inf")}], ids=["fine", "first", "second"])
def test_close_ends_the_thread(failures: dict[int, float]) -> None:
    before = ring_threads()
    ring = Ring(Reader(random.Random(6), failures), 3, SLOT_BYTES, CPU, poison=True)
    ring.set_schedule(range(20))
    (thread,) = ring_threads() - before
    ring.close()
    assert not thread.is_alive()


def test_close_does_not_begin_what_has_not_begun() -> None:
    reader = GatedReader()
    ring = Ring(reader, 3, SLOT_BYTES, CPU)
    ring.set_schedule([0, 1, 2])
    assert reader.at_the_gate.acquire(timeout=PATIENCE_S)
    closing = threading.Thread(target=ring.close)
    closing.start()
    for _ in range(PATIENCE_S * 1000):
        if ring._filled[2].cancelled():  # close has got so far
            break
        closing.join(1e-3)
    reader.gate.release(1000)
    closing.join(PATIENCE_S)
    assert not closing.is_alive() and reader.asked == [0]
