"""The processes of a run ("ranks"), one per device: their numbers, their machines, and how they communicate.

Gradients are summed by the launch's own process group (NCCL on GPUs), whose operations time out after ten
minutes, so that a rank that hangs is noticed. Preparation takes longer than that, and not equally long on
each rank: reading data, or downloading and quantizing a base of 70 billion parameters on one rank while the
others wait. So preparation uses a second group, between the hosts (gloo), which waits for a day and fails at
once when a rank ends.

    first    every rank sends its machine, and the launch's group sums a number once: a launch that does not
             work ends here, not after an hour of quantizing
    then     the memory that each rank may use, so that all follow one plan (plan/machine_plan.py); turns in
             quantizing, one rank per machine first; the pages that hold weights in RAM

Messages are JSON. (torch's own `all_gather_object` pickles.)
"""

from __future__ import annotations

import json
import mmap
import os
import platform
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as distributed

from qlora_train.errors import QloraTrainError
from qlora_train.weights.shared_pages import can_share, make_pages, open_pages

LONGEST_WAIT = timedelta(days=1)


@dataclass(frozen=True)
class Ranks:
    """All processes of a run, seen from one of them.

    index: this rank, from 0. number: the number of all ranks. here: the ranks of this machine, in order; the
    first is the leader, which does what is needed once per machine. shares_memory: whether the ranks of a
    machine can map the same pages, on every machine. group: the gloo process group, None for a single rank.
    """

    index: int = 0
    number: int = 1
    here: tuple[int, ...] = (0,)
    shares_memory: bool = False
    group: Any = None

    @property
    def leads(self) -> bool:
        """Whether this rank is the leader of its machine."""
        return self.index == self.here[0]

    def gather(self, value: Any) -> list[Any]:
        """Every rank's value (any JSON value), in the order of ranks. A collective, like the methods below:
        all ranks must call it."""
        if self.group is None:
            return [value]
        text = torch.frombuffer(bytearray(json.dumps(value).encode()), dtype=torch.uint8)
        with _partners_may_end():
            lengths = [torch.zeros(1, dtype=torch.int64) for _ in range(self.number)]
            distributed.all_gather(lengths, torch.tensor([len(text)]), group=self.group)
            longest = max(int(length) for length in lengths)
            texts = [torch.zeros(longest, dtype=torch.uint8) for _ in range(self.number)]
            padded = torch.cat([text, text.new_zeros(longest - len(text))])
            distributed.all_gather(texts, padded, group=self.group)
        return [json.loads(bytes(t[: int(n)].numpy())) for t, n in zip(texts, lengths, strict=True)]

    def of_leader(self, value: Any) -> Any:
        """The value of this machine's leader; the others' values are ignored."""
        return self.gather(value)[self.here[0]]

    def wait(self) -> None:
        """Wait until all ranks call this, at most `LONGEST_WAIT`."""
        if self.group is not None:
            with _partners_may_end():
                distributed.barrier(group=self.group)

    @contextmanager
    def leaders_first(self) -> Iterator[None]:
        """Run the body on rank 0, then on the other leaders, then on the rest, so that a cache folder is made
        once and found by the later ranks, whether or not machines share it."""
        turn = 0 if self.index == 0 else 1 if self.leads else 2
        for _ in range(turn):
            self.wait()
        yield
        for _ in range(2 - turn):
            self.wait()

    def shared_pages(self, num_bytes: int, fill: Callable[[mmap.mmap], object]) -> mmap.mmap:
        """Pages that all ranks of this machine map, filled by the leader. Requires `shares_memory`."""
        assert self.shares_memory
        if self.leads:
            descriptor, pages = make_pages(num_bytes)
            fill(pages)
            self.of_leader([os.getpid(), descriptor])
        else:
            process, descriptor = self.of_leader(None)
            pages = open_pages(process, descriptor, num_bytes)
        self.wait()
        if self.leads:
            os.close(descriptor)
        return pages


ALONE = Ranks()


def find_ranks(device: torch.device) -> Ranks:
    """The ranks of this launch; `ALONE` without a process group. device: the one that the launch's group sums
    on. Raises `QloraTrainError` if the group does not work."""
    if not distributed.is_initialized() or distributed.get_world_size() == 1:
        return ALONE
    index, number = distributed.get_rank(), distributed.get_world_size()
    with _partners_may_end():
        group = distributed.new_group(backend="gloo", timeout=LONGEST_WAIT)
        alone = Ranks(index, number, (index,), group=group)
    machines = alone.gather(_machine())
    here = tuple(rank for rank, machine in enumerate(machines) if machine == machines[index])
    one = torch.ones(1, device=device)
    with _partners_may_end():
        distributed.all_reduce(one)
        total = int(one)
    if total != number:
        raise QloraTrainError(f"the launch does not work: a sum over its {number} processes gave {total}")
    ranks = Ranks(index, number, here, group=group)
    return Ranks(index, number, here, shares_memory=_try_sharing(ranks), group=group)


def _machine() -> str:
    """An identifier of this machine, the same in all of its containers, whose host names differ."""
    boot = Path("/proc/sys/kernel/random/boot_id")
    return boot.read_text(encoding="ascii").strip() if boot.is_file() else platform.node()


def _try_sharing(ranks: Ranks) -> bool:
    """Whether every rank can read pages that its leader has written. Found by trying, since a rank may be in
    another container or lack permission. False where every rank has a machine of its own."""
    if max(ranks.gather(len(ranks.here))) == 1 or not all(ranks.gather(can_share())):
        return False
    word = ranks.of_leader(os.urandom(16).hex())
    descriptor, pages = make_pages(mmap.PAGESIZE)
    pages.write(word.encode())
    process, number = ranks.of_leader([os.getpid(), descriptor])
    try:
        word_read = open_pages(process, number, mmap.PAGESIZE).read(len(word)).decode(errors="replace")
    except (OSError, ValueError):  # no permission, or another process's file, too short to map
        word_read = ""
    shares = all(ranks.gather(word_read == word))
    os.close(descriptor)
    return shares


@contextmanager
def _partners_may_end() -> Iterator[None]:
    """Turn torch's error after another rank has ended into a `QloraTrainError`."""
    try:
        yield
    except RuntimeError as error:
        reason = str(error).strip().partition("\n")[0]
        raise QloraTrainError(
            f"the processes of this run have lost each other ({reason}). If another one has ended, its "
            "message says why."
        ) from error
