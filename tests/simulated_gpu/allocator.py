"""A model of CUDA's caching allocator: which bytes are allocated, which are reserved, when memory ends.

After c10/cuda/CUDACachingAllocator. A request is rounded up to 512 bytes. Up to 1 MiB it is served from
segments of 2 MiB (the small pool), else from the large pool: segments of 20 MiB for requests below 10 MiB,
else of the request rounded up to 2 MiB. The smallest free block of the same stream that fits is taken, and
split if at least 512 bytes (small pool) or more than 1 MiB (large pool) would remain. A freed block is joined
with free neighbours and stays reserved until `empty_cache`, or until a request finds no memory: then all
segments that are wholly free are given back, and it is tried once more.

Not modelled: expandable segments, the settings of PYTORCH_CUDA_ALLOC_CONF, private pools. Where a whole block
serves a smaller request, `allocated` counts the whole block, as CUDA does; `requested` counts the request.
"""

from __future__ import annotations

from bisect import bisect_left, insort
from dataclasses import dataclass, field
from itertools import count
from typing import Any

import torch

KIB, MIB, GIB = 2**10, 2**20, 2**30
BLOCK_BYTES = 512
SMALL_REQUEST_BYTES = MIB
SMALL_SEGMENT_BYTES = 2 * MIB
MEDIUM_REQUEST_BYTES = 10 * MIB
MEDIUM_SEGMENT_BYTES = 20 * MIB
SEGMENT_ROUNDING_BYTES = 2 * MIB
KINDS = ("requested_bytes", "allocated_bytes", "reserved_bytes", "allocation", "segment")


@dataclass(eq=False)
class Block:
    """Bytes of one segment. before, after: its neighbours there."""

    pool: tuple[str, int]
    """Of which sizes ("small_pool" or "large_pool"), for which stream."""
    num_bytes: int
    requested_bytes: int = 0
    is_free: bool = True
    before: Block | None = None
    after: Block | None = None

    @property
    def is_segment(self) -> bool:
        """Nothing else is in its segment."""
        return self.before is None and self.after is None


def round_up(num_bytes: int, unit: int) -> int:
    return -(-num_bytes // unit) * unit


@dataclass
class Figures:
    """One quantity of `memory_stats`."""

    current: int = 0
    peak: int = 0
    allocated: int = 0
    freed: int = 0

    def add(self, amount: int) -> None:
        self.current += amount
        self.peak = max(self.peak, self.current)
        if amount > 0:
            self.allocated += amount
        else:
            self.freed -= amount


@dataclass
class CachingAllocator:
    """Of one device. Numbers only: the bytes themselves are memory.py's."""

    device_index: int
    total_bytes: int = 8 * GIB
    limit_bytes: int | None = None
    """What this process can reserve at most, if less than the device has: the rest is in use by others."""
    context_bytes: int = 0
    """Of the driver's context, which is nobody's tensor."""
    fraction: float = 1.0
    """Of the total, as `set_per_process_memory_fraction` says."""
    fail_after: int | None = None
    """So many allocations succeed from now, and the next one does not."""
    num_alloc_retries: int = 0
    num_ooms: int = 0
    num_allocations: int = 0
    figures: dict[tuple[str, str], Figures] = field(default_factory=dict)
    _free: dict[tuple[str, int], list[tuple[int, int, Block]]] = field(default_factory=dict)
    """Each pool's free blocks as (bytes, number, block), by size."""
    _numbers: Any = field(default_factory=count)

    def __post_init__(self) -> None:
        pools = ("all", "small_pool", "large_pool")
        self.figures = {(kind, pool): Figures() for kind in KINDS for pool in pools}

    @property
    def allocated_bytes(self) -> int:
        return self.figures["allocated_bytes", "all"].current

    @property
    def reserved_bytes(self) -> int:
        return self.figures["reserved_bytes", "all"].current

    @property
    def free_bytes(self) -> int:
        """What the driver would still give."""
        limit = self.total_bytes if self.limit_bytes is None else min(self.limit_bytes, self.total_bytes)
        return max(0, limit - self.context_bytes - self.reserved_bytes)

    def allocate(self, num_bytes: int, stream: int) -> Block:
        """Raises torch.OutOfMemoryError, after the cache was emptied in vain."""
        self.num_allocations += 1
        if self.fail_after is not None:
            self.fail_after -= 1
            if self.fail_after < 0:
                self.fail_after = None
                self._retry()
                self._run_out(num_bytes)
        rounded = max(BLOCK_BYTES, round_up(num_bytes, BLOCK_BYTES))
        pool = ("small_pool" if rounded <= SMALL_REQUEST_BYTES else "large_pool", stream)
        block = self._best_fit(pool, rounded) or self._new_segment(pool, rounded, num_bytes)
        self._split(block, rounded)
        block.is_free, block.requested_bytes = False, num_bytes
        self._count(pool[0], allocation=1, requested_bytes=num_bytes, allocated_bytes=block.num_bytes)
        return block

    def free(self, block: Block) -> None:
        self._count(
            block.pool[0],
            allocation=-1,
            requested_bytes=-block.requested_bytes,
            allocated_bytes=-block.num_bytes,
        )
        block.is_free, block.requested_bytes = True, 0
        for neighbour in (block.before, block.after):
            if neighbour is not None and neighbour.is_free:
                self._take(neighbour)
                _join(block, neighbour)
        self._give(block)

    def empty_cache(self) -> None:
        """Segments without a live block go back to the driver."""
        for pool, blocks in self._free.items():
            for _, _, block in [entry for entry in blocks if entry[2].is_segment]:
                self._take(block)
                self._count(pool[0], segment=-1, reserved_bytes=-block.num_bytes)

    def reset_peaks(self) -> None:
        for figures in self.figures.values():
            figures.peak = figures.current

    def statistics(self) -> dict[str, int]:
        """As `torch.cuda.memory_stats`, flat, as far as it is modelled."""
        stats = {
            f"{kind}.{pool}.{metric}": value
            for (kind, pool), figures in self.figures.items()
            for metric, value in vars(figures).items()
        }
        events = {"num_alloc_retries": self.num_alloc_retries, "num_ooms": self.num_ooms}
        return dict(sorted({**stats, **events}.items()))

    def _best_fit(self, pool: tuple[str, int], num_bytes: int) -> Block | None:
        blocks = self._free.get(pool, [])
        position = bisect_left(blocks, num_bytes, key=lambda entry: entry[0])
        return blocks.pop(position)[2] if position < len(blocks) else None

    def _new_segment(self, pool: tuple[str, int], rounded: int, requested: int) -> Block:
        if pool[0] == "small_pool":
            num_bytes = SMALL_SEGMENT_BYTES
        elif rounded < MEDIUM_REQUEST_BYTES:
            num_bytes = MEDIUM_SEGMENT_BYTES
        else:
            num_bytes = round_up(rounded, SEGMENT_ROUNDING_BYTES)
        if not self._fits(num_bytes):
            self._retry()
            if not self._fits(num_bytes):
                self._run_out(requested)
        self._count(pool[0], segment=1, reserved_bytes=num_bytes)
        return Block(pool, num_bytes)

    def _fits(self, num_bytes: int) -> bool:
        allowed = int(self.total_bytes * self.fraction)
        return num_bytes <= self.free_bytes and self.reserved_bytes + num_bytes <= allowed

    def _retry(self) -> None:
        self.num_alloc_retries += 1
        self.empty_cache()

    def _run_out(self, num_bytes: int) -> None:
        self.num_ooms += 1
        raise torch.OutOfMemoryError(
            f"SIM out of memory. Tried to allocate {num_bytes / MIB:.2f} MiB. GPU {self.device_index} has a "
            f"total capacity of {self.total_bytes / GIB:.2f} GiB of which {self.free_bytes / MIB:.2f} MiB is "
            "free. "
            f"{self.allocated_bytes / MIB:.2f} MiB is allocated by PyTorch, and "
            f"{(self.reserved_bytes - self.allocated_bytes) / MIB:.2f} MiB is reserved but unallocated."
        )

    def _split(self, block: Block, num_bytes: int) -> None:
        """The rest of a block stays free, if that is worth while."""
        rest = block.num_bytes - num_bytes
        if rest >= BLOCK_BYTES if block.pool[0] == "small_pool" else rest > SMALL_REQUEST_BYTES:
            remainder = Block(block.pool, rest, before=block, after=block.after)
            if block.after is not None:
                block.after.before = remainder
            block.after, block.num_bytes = remainder, num_bytes
            self._give(remainder)

    def _give(self, block: Block) -> None:
        insort(
            self._free.setdefault(block.pool, []),
            (block.num_bytes, next(self._numbers), block),
            key=lambda entry: entry[:2],
        )

    def _take(self, block: Block) -> None:
        blocks = self._free[block.pool]
        position = bisect_left(blocks, block.num_bytes, key=lambda entry: entry[0])
        while blocks[position][2] is not block:
            position += 1
        del blocks[position]

    def _count(self, pool: str, **amounts: int) -> None:
        for kind, amount in amounts.items():
            self.figures[kind, pool].add(amount)
            self.figures[kind, "all"].add(amount)


def _join(block: Block, neighbour: Block) -> None:
    """A free neighbour becomes part of the block."""
    if neighbour is block.before:
        block.before = neighbour.before
        if block.before is not None:
            block.before.after = block
    else:
        block.after = neighbour.after
        if block.after is not None:
            block.after.before = block
    block.num_bytes += neighbour.num_bytes
