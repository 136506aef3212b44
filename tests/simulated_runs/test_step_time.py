"""Where the time of a step goes, in whole runs on the CPU and on a simulated GPU.

What is slow here waits until computing waits for it, and then for DELAY_S more: so the least that must be
found under its cause is known, however fast or busy the machine is.
"""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import count
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from tiny_runs import recipe_values, reversal_rows, write_base, write_rows

from qlora_train.device import compute
from qlora_train.device.compute import ComputeDevice
from qlora_train.device.step_clock import OF_A_STEP, Cause
from qlora_train.kernels.on_device import find_device
from qlora_train.recipe import Recipe
from qlora_train.train import loop, train
from qlora_train.train import run as run_module
from qlora_train.train.batches import BatchPrefetcher
from qlora_train.walk.host_offload import HostOffloader
from qlora_train.weights.host_memory import HostMemory
from qlora_train.weights.ring import Ring
from qlora_train.weights.stores import ItemReader
from qlora_train.weights.streaming import StreamedMatrix

pytestmark = pytest.mark.filterwarnings("ignore:Triton does not run")
NUM_STEPS, NUM_LAYERS = 3, 4
DELAY_S, PATIENCE_S = 0.01, 10.0


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_base(tmp_path_factory.mktemp("base"), num_hidden_layers=NUM_LAYERS)


@pytest.fixture(params=["cpu", "sim"])
def device(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> ComputeDevice:
    """That of the run, with its clock."""
    if request.param == "sim":
        request.getfixturevalue("simulated_gpu").settings.num_multiprocessors = 2
    found = find_device()
    monkeypatch.setattr(run_module, "find_device", lambda where: found)
    return found


def rows_of(base: Path, folder: Path, memory: dict[str, Any], **options: Any) -> list[dict[str, Any]]:
    """The steps of metrics.jsonl of a run."""
    rows = write_rows(folder / "rows.jsonl", reversal_rows(60))
    values = recipe_values(base, rows, folder / "run", training={"max_steps": NUM_STEPS})
    train(Recipe.from_dict(values | {"memory": memory}), **options)
    found = [json.loads(line) for line in (folder / "run" / "metrics.jsonl").read_text().splitlines()]
    return [row for row in found if "loss" in row]


class Slow:
    """What comes DELAY_S after computing has begun to wait for it. num: how often, in steps."""

    def __init__(self, clock: Any) -> None:
        self._clock, self._wanted = clock, None
        self.num, self.is_over = 0, threading.Event()

    @contextmanager
    def wanting(self, what: object) -> Iterator[None]:
        self._wanted = what
        try:
            yield
        finally:
            self._wanted = None

    def come(self, what: object) -> None:
        patience = time.monotonic() + PATIENCE_S
        while self._wanted != what and not self.is_over.wait(0.001) and time.monotonic() < patience:
            pass
        self.num += self._wanted == what and self._clock.cause is not None
        time.sleep(DELAY_S)

    def until_the_last(self, row: Any) -> None:
        """`on_step`: nothing is wanted after the last step."""
        if row["step"] == NUM_STEPS:
            self.is_over.set()


def slowed(monkeypatch: pytest.MonkeyPatch, slow: Slow, wants: Any, comes: Any) -> None:
    """wants, comes: (class, name) of methods that wait for their argument, and bring it."""

    def wanting(original: Callable[..., Any]) -> Callable[..., Any]:
        def method(self: Any, what: Any) -> Any:
            with slow.wanting(what):
                return original(self, what)

        return method

    def coming(original: Callable[..., Any]) -> Callable[..., Any]:
        def method(self: Any, what: Any, *arguments: Any) -> Any:
            slow.come(what)
            return original(self, what, *arguments)

        return method

    for (owner, name), wrap in ((wants, wanting), (comes, coming)):
        monkeypatch.setattr(owner, name, wrap(getattr(owner, name)))


@pytest.mark.parametrize(
    ("cause", "memory", "wants", "comes"),
    [
        (Cause.ROWS, {}, (BatchPrefetcher, "take"), (BatchPrefetcher, "_on_host")),
        (Cause.WEIGHTS, {"weights": "disk"}, (Ring, "acquire"), (ItemReader, "read")),
    ],
    ids=["rows", "weights"],
)
def test_what_is_slow_is_waited_for(
    base: Path,
    tmp_path: Path,
    device: ComputeDevice,
    monkeypatch: pytest.MonkeyPatch,
    cause: Cause,
    memory: dict[str, Any],
    wants: Any,
    comes: Any,
) -> None:
    slow = Slow(device.clock)
    slowed(monkeypatch, slow, wants, comes)
    rows = rows_of(base, tmp_path, memory, on_step=slow.until_the_last)
    assert slow.num >= NUM_STEPS
    assert sum(row[cause.key] for row in rows) >= slow.num * DELAY_S


def test_slow_copies_of_activations_are_waited_for(
    base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    delays, original = count(), HostMemory.borrow

    def borrow(self: HostMemory, num_bytes: int) -> Any:
        time.sleep(DELAY_S)
        next(delays)
        return original(self, num_bytes)

    monkeypatch.setattr(HostMemory, "borrow", borrow)
    rows = rows_of(base, tmp_path, {"activations": "offload"})
    num_delays = next(delays)
    assert num_delays >= NUM_STEPS * NUM_LAYERS
    assert sum(row[Cause.ACTIVATIONS.key] for row in rows) >= num_delays * DELAY_S


def test_slow_copies_of_activations_on_a_gpu(
    base: Path, tmp_path: Path, simulated_gpu: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The side stream has not come far where the compute stream waits for it."""
    simulated_gpu.settings.num_multiprocessors = 2
    device, delays = find_device(), count()
    monkeypatch.setattr(run_module, "find_device", lambda where: device)
    compute_stream = type(device.current_stream())
    original = compute_stream.wait_event

    def wait_event(self: Any, event: Any) -> None:
        if self.is_default and device.clock.cause is not None:
            time.sleep(DELAY_S)
            next(delays)
        original(self, event)

    monkeypatch.setattr(compute_stream, "wait_event", wait_event)
    rows = rows_of(base, tmp_path, {"weights": "resident", "activations": "offload"})
    num_delays = next(delays)
    assert num_delays >= 2 * NUM_STEPS * NUM_LAYERS
    assert sum(row[Cause.ACTIVATIONS.key] for row in rows) >= num_delays * DELAY_S


@pytest.mark.parametrize("name", ["disk", "ram"])
def test_causes_sum_to_the_seconds_of_the_step(
    base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    """On a clock that moves on by one whenever it is asked: the step's time without its first and last tick,
    of which the two after the host's read are the next row's."""
    ticks = count()
    clock = SimpleNamespace(monotonic=lambda: float(next(ticks)), perf_counter=lambda: float(next(ticks)))
    for module in (loop, compute):
        monkeypatch.setattr(module, "time", clock)
    memory = {"weights": name, "activations": "offload"}
    for number, row in enumerate(rows_of(base, tmp_path, memory), 1):
        seconds = row["num_tokens"] / row["tokens_per_second"]
        found = sum(row.get(cause.key, 0.0) for cause in OF_A_STEP)
        assert found == pytest.approx(seconds - 2 - 2 * (number == 1), abs=1e-6)
        assert all(row[key.key] > 0 for key in (Cause.ROWS, Cause.WEIGHTS, Cause.ACTIVATIONS, Cause.LOSS))


def test_a_gpu_is_asked_for_few_moments(
    base: Path, tmp_path: Path, simulated_gpu: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two around each wait, two for each part of a step, and here two groups of micro-batches."""
    simulated_gpu.settings.num_multiprocessors = 2
    moments, waits = count(), count()

    def counted(counter: Any, owner: type, name: str) -> None:
        original = getattr(owner, name)
        monkeypatch.setattr(owner, name, lambda *arguments: (next(counter), original(*arguments))[1])

    counted(moments, ComputeDevice, "moment")
    for owner, name in ((HostOffloader, "waiting"), (Ring, "acquire"), (StreamedMatrix, "gather")):
        counted(waits, owner, name)
    rows_of(base, tmp_path, {"weights": "ram", "activations": "offload"})
    assert 0 < next(moments) <= 2 * next(waits) + 20 * NUM_STEPS
