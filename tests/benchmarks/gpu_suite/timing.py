"""How long one operation takes on the device, how many kernels it is, and how long it keeps the host.

Before every run the device's cache is written over, as the layers between would do it. That also gives the
host time to queue what follows, so that most of what is timed is the device's work; what is left of the
host's shows in milliseconds against kernel_milliseconds.
"""

from __future__ import annotations

import json
import statistics
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile, supported_activities

from benchmarks.gpu_suite.traces import profile_table
from qlora_train.device.compute import ComputeDevice

NUM_WARM_UP, MOST_SECONDS = 3, 0.25


@dataclass(frozen=True)
class Way:
    """One way of doing something. point: what is done, and the shape; way: how. run: does it once. num_bytes:
    that must be read and written; num_flops: of its matrix products; 0 where no rate is to be said."""

    point: str
    way: str
    run: Callable[[], object]
    num_bytes: int = 0
    num_flops: int = 0


class Timer:
    """flush_bytes: more than the device's cache holds. most_runs: of a way; at least one is timed."""

    def __init__(self, device: ComputeDevice, flush_bytes: int, most_runs: int) -> None:
        self._device, self._most_runs = device, most_runs
        self._flushed = torch.empty(flush_bytes, dtype=torch.uint8, device=device.torch)

    def figures(self, way: Way) -> dict[str, Any]:
        """Medians of the runs that MOST_SECONDS allow: milliseconds on the device, between events;
        host_milliseconds, until the call returns. Of one profiled run: num_kernels, kernel_milliseconds
        (their sum)."""
        for _ in range(min(NUM_WARM_UP, self._most_runs)):
            way.run()
        runs = [self._once(way.run)]
        while len(runs) < self._most_runs and sum(seconds for seconds, _ in runs) < MOST_SECONDS:
            runs.append(self._once(way.run))
        seconds, host_seconds = (statistics.median(values) for values in zip(*runs, strict=True))
        figures = {"milliseconds": seconds * 1e3, "host_milliseconds": host_seconds * 1e3}
        if way.num_bytes:
            figures["gb_per_second"] = way.num_bytes / seconds / 1e9
        if way.num_flops:
            figures["tflops_per_second"] = way.num_flops / seconds / 1e12
        return figures | self._kernels(way.run)

    def _once(self, run: Callable[[], object]) -> tuple[float, float]:
        """Seconds (on the device, of the host)."""
        self._flushed.zero_()
        start, began = self._device.moment(), time.perf_counter()
        run()
        host_seconds = time.perf_counter() - began
        end = self._device.moment()
        self._device.wait()
        return self._device.seconds_between(start, end), host_seconds

    def _kernels(self, run: Callable[[], object]) -> dict[str, Any]:
        is_cuda = self._device.torch.type == "cuda"  # whose kernels are all that counts
        activities = {ProfilerActivity.CUDA} if is_cuda else supported_activities()
        with profile(activities=activities) as profiler:
            run()
            self._device.wait()
        with tempfile.TemporaryDirectory() as folder:
            file = Path(folder) / "trace.json"
            profiler.export_chrome_trace(str(file))
            table = profile_table(json.loads(file.read_bytes())["traceEvents"])
        return {name: table[name] for name in ("num_kernels", "kernel_milliseconds")}
