"""Rates are measured once and kept, on a nearly full card too, and leave nothing on the device."""

from __future__ import annotations

import math
import os
import re
from dataclasses import replace
from multiprocessing.connection import Connection
from pathlib import Path

import pytest
import torch
from simulated_gpu.fixture import SimulatedGpu
from warm_processes import TIMEOUT_SECONDS, warm_context

from qlora_train.device.compute import THE_CPU, ComputeDevice
from qlora_train.device.description import CPU
from qlora_train.files.atomic_file import replace_text
from qlora_train.files.sealed_json import seal, unseal
from qlora_train.plan import measured_rates
from qlora_train.plan.measured_rates import kept_rates, matrix_size, rates_of, share_of_processors
from qlora_train.plan.time_model import stated_rates

MIB = 2**20


@pytest.fixture
def small(sim: ComputeDevice, monkeypatch: pytest.MonkeyPatch) -> ComputeDevice:
    """Few multiprocessors, so that products are quick here."""
    monkeypatch.setattr(measured_rates, "_CPU_MATRIX", 64)
    return ComputeDevice(replace(sim.description, num_multiprocessors=2))


def test_measured_once(small: ComputeDevice, simulated_gpu: SimulatedGpu, tmp_path: Path) -> None:
    measured = rates_of(small, torch.float32, tmp_path)
    assert min(measured.flops, measured.memory, measured.copy) > 0
    assert "256 x 256" in measured.source
    assert simulated_gpu.live_bytes() == simulated_gpu.reserved_bytes() == simulated_gpu.pinned_bytes == 0
    calls = simulated_gpu.num_operators
    assert rates_of(small, torch.float32, tmp_path) == measured
    assert simulated_gpu.num_operators == calls
    assert rates_of(small, torch.float16, tmp_path) != measured
    assert len(unseal(tmp_path / "rates.json")) == 2


def test_on_the_cpu(small: ComputeDevice, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What a CPU did beside other programs is kept until it is measured without them."""
    share = 0.4
    monkeypatch.setattr(measured_rates, "share_of_processors", lambda dtype, size: share)
    beside = rates_of(THE_CPU, torch.float32, tmp_path)
    assert "other programs were busy" in beside.source
    assert rates_of(THE_CPU, torch.float32, tmp_path) == beside == kept_rates(CPU, torch.float32, tmp_path)
    share = 0.95
    alone = rates_of(THE_CPU, torch.float32, tmp_path)
    assert "busy" not in alone.source
    share = 0.4
    assert rates_of(THE_CPU, torch.float32, tmp_path) == alone == kept_rates(CPU, torch.float32, tmp_path)


@pytest.mark.skipif(not Path("/proc/self/schedstat").exists(), reason="this system does not tell")
def test_the_share_of_the_processors_is_what_other_programs_leave() -> None:
    """Of two programs on one processor, neither has it for itself."""
    processor = min(os.sched_getaffinity(0))
    with warm_context() as context:
        ours, theirs = context.Pipe()
        busy = context.Process(target=_work_without_end, args=(theirs, processor))
        busy.start()
        try:
            assert ours.poll(TIMEOUT_SECONDS) and ours.recv() == "busy"
            measuring = context.Process(target=_send_share, args=(theirs, processor))
            measuring.start()
            assert ours.poll(TIMEOUT_SECONDS)
            share = ours.recv()
            measuring.join()
        finally:
            busy.kill()
            busy.join()
    assert share < 0.85


def _take_one(processor: int) -> None:
    os.sched_setaffinity(0, {processor})
    torch.set_num_threads(1)


def _work_without_end(pipe: Connection, processor: int) -> None:
    _take_one(processor)
    pipe.send("busy")
    while True:
        pass


def _send_share(pipe: Connection, processor: int) -> None:
    _take_one(processor)
    share_of_processors(torch.float32, 512)
    pipe.send(share_of_processors(torch.float32, 2048))


@pytest.mark.parametrize("damaged_copy", ["-5.0", "Infinity", '"fast"', "7.0", "{"])
def test_a_damaged_file_is_written_anew(small: ComputeDevice, tmp_path: Path, damaged_copy: str) -> None:
    rates_of(small, torch.float32, tmp_path)
    text = (tmp_path / "rates.json").read_text()
    (tmp_path / "rates.json").write_text(re.sub(r'"copy": [^,]*', f'"copy": {damaged_copy}', text))
    again = rates_of(small, torch.float32, tmp_path)
    assert 0 < again.copy < math.inf and again.copy != 7
    assert len(unseal(tmp_path / "rates.json")) == 1


def test_rates_of_an_older_version_are_measured_again(small: ComputeDevice, tmp_path: Path) -> None:
    rates_of(small, torch.float32, tmp_path)
    kept = unseal(tmp_path / "rates.json")
    ((key, rates),) = ((k, v) for k, v in kept.items() if isinstance(v, dict))
    replace_text(tmp_path / "rates.json", seal({key: {k: v for k, v in rates.items() if k != "attention"}}))
    assert rates_of(small, torch.float32, tmp_path).attention > 0


def test_rates_of_copies_that_were_refused_are_not_kept(
    small: ComputeDevice, simulated_gpu: SimulatedGpu, tmp_path: Path
) -> None:
    simulated_gpu.refuse_pinning()
    assert rates_of(small, torch.float32, tmp_path).copy > 0
    assert not (tmp_path / "rates.json").exists()


def test_a_nearly_full_card_is_measured_with_what_fits(
    sim: ComputeDevice, simulated_gpu: SimulatedGpu, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Products that had to be small say less than those of an empty card: they are not kept."""
    monkeypatch.setattr(measured_rates, "_REPEATS", 1)
    many = ComputeDevice(replace(sim.description, num_multiprocessors=132))
    simulated_gpu.limit_memory(256 * MIB)
    assert "2304 x 2304" in rates_of(many, torch.float32, tmp_path).source
    assert not (tmp_path / "rates.json").exists() and simulated_gpu.reserved_bytes() == 0


@pytest.mark.parametrize(("device_name", "num_tokens"), [("cpu", 512), ("sim", 1024)])
def test_a_gpu_attends_to_as_many_tokens_as_keep_it_busy(
    sim: ComputeDevice, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, device_name: str, num_tokens: int
) -> None:
    timed: list[int] = []
    monkeypatch.setattr(measured_rates, "fastest_seconds", lambda device, run: 1.0)
    monkeypatch.setattr(measured_rates, "_attention_rate", lambda device, dtype, number: timed.append(number))
    device = sim if device_name == "sim" else THE_CPU
    host = torch.empty(MIB, dtype=torch.uint8)
    measured_rates._measure(
        device, torch.float32, matrix_size(device.description, 2**34, torch.float32), host
    )
    assert timed == [num_tokens]


@pytest.mark.parametrize("free_bytes", [0, 1, 5 * MIB, 255 * MIB])
def test_a_full_card_is_not_measured(
    small: ComputeDevice, simulated_gpu: SimulatedGpu, tmp_path: Path, free_bytes: int
) -> None:
    simulated_gpu.limit_memory(free_bytes)
    assert rates_of(small, torch.float32, tmp_path) == stated_rates(small.description)
    assert not (tmp_path / "rates.json").exists()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("free_gib", [0.3, 1, 4, 24, 80])
def test_three_matrices_in_a_quarter_of_what_is_free(
    sim: ComputeDevice, dtype: torch.dtype, free_gib: float
) -> None:
    large = replace(sim.description, num_multiprocessors=132)
    size = matrix_size(large, int(free_gib * 2**30), dtype)
    assert size % 64 == 0 and 3 * dtype.itemsize * size**2 <= free_gib * 2**30 / 4
    assert size == 8192 or 3 * dtype.itemsize * (size + 64) ** 2 > free_gib * 2**30 / 4
    assert matrix_size(sim.description, 2**40, dtype) == 128 * 16
