"""Two steps looked at closely: where the time goes, and who holds the memory at its peak.

A profiler trace is megabytes and a snapshot of the allocator needs a viewer, so both are kept, compressed,
and a table is made of each: kernels by their share of the step, places in the sources by the bytes that they
held at the peak.

    <name>.trace.json.gz         for chrome://tracing and ui.perfetto.dev
    <name>.snapshot.pickle.gz    for pytorch.org/memory_viz, compressed; written here and never read

A file larger than may be taken from the machine is left out, the trace first without the host's side.
"""

from __future__ import annotations

import gzip
import json
import pickle
import re
import tempfile
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch.profiler import profile, supported_activities

from qlora_train.device.compute import ComputeDevice

MAX_FILE_BYTES = 15 * 2**20
MAX_ENTRIES = 100_000
"""Of the allocator's history."""
NUM_KERNELS, NUM_PLACES, NAME_LENGTH = 30, 20, 90
ON_DEVICE = ("kernel", "gpu_memcpy", "gpu_memset")
KINDS = {
    "attention": r"flash|fmha|attention",
    "matrix products": r"gemm|gemv|cutlass|nvjet|xmma|aten::(add)?b?mm|matmul|linear",
    "copies": r"memcpy|memset",
    "dequantizing": r"dequantize",
}
"""By name, the first that matches; the rest is "other"."""


class Tracer:
    """Told between steps; see `next_step`. name: of the files in `out`; None: nothing is traced. figures and
    remarks: what was found."""

    def __init__(self, device: ComputeDevice, out: Path, name: str | None) -> None:
        self._device, self._out, self._name = device, out, name
        self._turn = 0
        self._profiler: profile | None = None
        self.figures: dict[str, Any] = {}
        self.remarks: list[str] = []

    def next_step(self) -> None:
        """Before the step to profile, before the one whose allocations are recorded, and after that."""
        if self._name is None:
            return
        turn, self._turn = self._turn, self._turn + 1
        if turn == 0:
            self._profiler = profile(activities=supported_activities())
            self._profiler.start()
        elif turn == 1:
            self._end_profile(self._name)
            self._record_history()
        elif turn == 2:
            self._end_history(self._name)

    def _end_profile(self, name: str) -> None:
        assert self._profiler is not None
        self._device.wait()
        self._profiler.stop()
        with tempfile.TemporaryDirectory() as folder:
            file = Path(folder) / "trace.json"
            self._profiler.export_chrome_trace(str(file))
            trace = json.loads(file.read_bytes())
        self._profiler = None
        self.figures["profile"] = profile_table(trace["traceEvents"])
        on_device = [e for e in trace["traceEvents"] if e.get("cat") in ON_DEVICE or e.get("ph") == "M"]
        file = self._out / f"{name}.trace.json.gz"
        contents = (trace, {**trace, "traceEvents": on_device})
        self._keep(file, (json.dumps(content).encode() for content in contents))

    def _memory(self) -> Any:
        """The allocator's history, of devices whose module in torch has one."""
        memory = getattr(torch.get_device_module(self._device.torch), "memory", None)
        return memory if hasattr(memory, "_record_memory_history") else None

    def _record_history(self) -> None:
        memory = self._memory()
        if memory is None:
            self.remarks.append(f"{self._device.torch.type} has no history of its allocator")
            return
        memory._record_memory_history(stacks="python", max_entries=MAX_ENTRIES)

    def _end_history(self, name: str) -> None:
        memory = self._memory()
        if memory is None:
            return
        self._device.wait()
        snapshot = memory._snapshot()
        memory._record_memory_history(enabled=None)
        self.figures["allocator"] = allocator_table(snapshot, self._device.torch.index or 0)
        self._keep(self._out / f"{name}.snapshot.pickle.gz", iter([pickle.dumps(snapshot)]))

    def _keep(self, file: Path, contents: Iterator[bytes]) -> None:
        """The first that is small enough."""
        for content in contents:
            packed = gzip.compress(content, 6)
            if len(packed) <= MAX_FILE_BYTES:
                file.parent.mkdir(parents=True, exist_ok=True)
                file.write_bytes(packed)
                return
        self.remarks.append(f"{file.name} would be {len(packed) / 2**20:.0f} MiB and is left out")


def profile_table(events: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """From a chrome trace of one step. step_milliseconds: from the first to the last thing that the device
    did (without an accelerator: that the host did); busy_share: how much of that it did something;
    num_kernels, kernel_milliseconds: of all; kinds, and kernels (name, count, milliseconds, share), by their
    share of it. Streams may overlap, so shares of all may sum to more than busy_share."""
    spans = [e for e in events if e.get("cat") in ON_DEVICE and e["ph"] == "X"]
    spans = _outermost(spans or [e for e in events if e.get("cat") == "cpu_op" and e["ph"] == "X"])
    if not spans:
        nothing = {"step_milliseconds": 0.0, "busy_share": 0.0, "num_kernels": 0, "kernel_milliseconds": 0.0}
        return {**nothing, "kinds": {}, "kernels": []}
    begins = [(float(e["ts"]), float(e["ts"]) + float(e["dur"])) for e in spans]
    whole = max(end for _, end in begins) - min(start for start, _ in begins)
    micros: Counter[str] = Counter()
    counts: Counter[str] = Counter()
    kinds: Counter[str] = Counter()
    for event in spans:
        name = str(event["name"])[:NAME_LENGTH]
        micros[name] += event["dur"]
        counts[name] += 1
        kinds[kind_of(str(event["name"]))] += event["dur"]
    return {
        "step_milliseconds": whole / 1e3,
        "busy_share": _covered(begins) / whole,
        "num_kernels": len(spans),
        "kernel_milliseconds": micros.total() / 1e3,
        "kinds": {kind: value / whole for kind, value in kinds.most_common()},
        "kernels": [
            [name, counts[name], value / 1e3, value / whole]
            for name, value in micros.most_common(NUM_KERNELS)
        ],
    }


def kind_of(kernel: str) -> str:
    return next((kind for kind, words in KINDS.items() if re.search(words, kernel, re.I)), "other")


def _outermost(spans: Sequence[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    """Those that lie in no other of their thread or stream."""
    found: list[Mapping[str, Any]] = []
    ends: dict[tuple[Any, Any], float] = {}
    for span in sorted(spans, key=lambda e: (float(e["ts"]), -float(e["dur"]))):
        where = (span["pid"], span["tid"])
        if float(span["ts"]) >= ends.get(where, float("-inf")):
            ends[where] = float(span["ts"]) + float(span["dur"])
            found.append(span)
    return found


def _covered(spans: Sequence[tuple[float, float]]) -> float:
    """How much of the time at least one of them takes."""
    covered, reached = 0.0, float("-inf")
    for start, end in sorted(spans):
        covered += max(0.0, end - max(start, reached))
        reached = max(reached, end)
    return covered


def allocator_table(snapshot: Mapping[str, Any], device: int) -> dict[str, Any]:
    """From a snapshot with the history of one step. At its end: reserved_bytes, allocated_bytes,
    largest_free_bytes (in a row), num_segments. At its peak: peak_bytes above its start, and held_at_peak,
    the places (file:line function, bytes) whose allocations since the start were alive then."""
    segments = [s for s in snapshot["segments"] if s.get("device", device) == device]
    blocks = [block for segment in segments for block in segment["blocks"]]
    trace = snapshot["device_traces"][device]
    peak_bytes, live = _at_peak(trace)
    held: Counter[str] = Counter()
    for event in live:
        held[_place(event.get("frames", ()))] += event["size"]
    return {
        "reserved_bytes": sum(s["total_size"] for s in segments),
        "allocated_bytes": sum(s["allocated_size"] for s in segments),
        "largest_free_bytes": max((b["size"] for b in blocks if b["state"] == "inactive"), default=0),
        "num_segments": len(segments),
        "num_events": len(trace),
        "peak_bytes": peak_bytes,
        "held_at_peak": [[place, num_bytes] for place, num_bytes in held.most_common(NUM_PLACES)],
    }


def _at_peak(trace: Sequence[Mapping[str, Any]]) -> tuple[int, list[Mapping[str, Any]]]:
    """The most bytes above the start of a history, and the allocations in it that were alive then."""
    signs = {"alloc": 1, "free_completed": -1}
    total, most, peak_at = 0, 0, 0
    for number, event in enumerate(trace, 1):
        total += signs.get(event["action"], 0) * event["size"]
        if total > most:
            most, peak_at = total, number
    live: dict[int, Mapping[str, Any]] = {}
    for event in trace[:peak_at]:
        if event["action"] == "alloc":
            live[event["addr"]] = event
        elif event["action"] == "free_completed":
            live.pop(event["addr"], None)
    return most, list(live.values())


def _place(frames: Sequence[Mapping[str, Any]]) -> str:
    """The innermost frame of this package, else the innermost of all."""
    ours = [frame for frame in frames if "qlora_train" in frame["filename"]] or frames
    if not ours:
        return "unknown"
    path = Path(ours[0]["filename"])
    return f"{path.parent.name}/{path.name}:{ours[0]['line']} {ours[0]['name']}"
