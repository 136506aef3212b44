"""What the host makes for every micro-batch, on its way to a simulated GPU: buffers serve again when their
copy is done, never before."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable
from typing import Any

import pytest
import torch
from simulated_gpu.fixture import SimulatedGpu
from torch import Tensor

from qlora_train.device.compute import THE_CPU, ComputeDevice
from qlora_train.weights import uploads as module
from qlora_train.weights.host_memory import HostMemory
from qlora_train.weights.uploads import LEAST_BUFFER_BYTES, PIECE_ALIGNMENT_BYTES, Uploads

MIXED = [
    torch.arange(7, dtype=torch.int64),
    torch.tensor(3.5, dtype=torch.float64),
    torch.tensor([True, False, True]),
    torch.empty(0, 4, dtype=torch.int32),
    torch.arange(24, dtype=torch.float32).view(2, 3, 4).transpose(0, 2),
    torch.randn(300, generator=torch.Generator().manual_seed(1)).to(torch.bfloat16),
]


def test_tensors_of_all_kinds_arrive_in_one_copy(simulated_gpu: SimulatedGpu, sim: ComputeDevice) -> None:
    uploads = Uploads(sim, HostMemory(sim))
    staged = uploads.stage(MIXED)
    calls = simulated_gpu.num_calls["aten::copy_"]
    simulated_gpu.host_reads.clear()
    sent = uploads.send(staged)
    assert simulated_gpu.num_calls["aten::copy_"] == calls + 1
    assert not simulated_gpu.host_reads.copies and not simulated_gpu.host_reads.synchronizations
    for found, expected in zip(sent, MIXED, strict=True):
        assert found.device == sim.torch and found.dtype == expected.dtype
        assert torch.equal(found.cpu(), expected)
    assert len({t.untyped_storage().data_ptr() for t in sent}) == 1
    assert all(t.storage_offset() * t.itemsize % PIECE_ALIGNMENT_BYTES == 0 for t in sent)
    assert sent[0].untyped_storage().nbytes() == 4 * 256 + 768  # the empty one takes nothing


def test_the_host_may_write_over_what_was_staged(sim: ComputeDevice) -> None:
    uploads, numbers = Uploads(sim, HostMemory(sim)), torch.arange(10)
    staged = uploads.stage([numbers])
    numbers.zero_()
    assert uploads.send(staged)[0].tolist() == list(range(10))


def test_a_buffer_serves_again_when_its_copy_is_done(simulated_gpu: SimulatedGpu, sim: ComputeDevice) -> None:
    """Copies on a side stream are late: more than one buffer, and no more than copies are under way."""
    host = HostMemory(sim)
    uploads, stream = Uploads(sim, host), sim.side_stream()
    sent: list[Tensor] = []
    with sim.on(stream):
        for round_number in range(3):
            for i in range(4):
                sent += uploads.send(uploads.stage([torch.full((50,), 10 * round_number + i)]))
            assert LEAST_BUFFER_BYTES < host.num_bytes <= 4 * LEAST_BUFFER_BYTES
            assert host.num_bytes == simulated_gpu.pinned_bytes
            stream.synchronize()
    sim.current_stream().wait_stream(stream)
    assert [int(t[0]) for t in sent] == [0, 1, 2, 3, 10, 11, 12, 13, 20, 21, 22, 23]
    assert all(bool((t == t[0]).all()) for t in sent)


def test_what_is_staged_waits_for_its_sending(sim: ComputeDevice) -> None:
    """Evaluations stage while the next step's batches are staged already."""
    uploads = Uploads(sim, HostMemory(sim))
    early = [uploads.stage([torch.full((20,), i)]) for i in range(3)]
    for i in range(3, 8):
        (between,) = uploads.send(uploads.stage([torch.full((20,), i)]))
        assert between.tolist() == [i] * 20
    assert [uploads.send(staged)[0].tolist() for staged in reversed(early)] == [[i] * 20 for i in (2, 1, 0)]


def test_threads_do_not_get_each_others_buffers(sim: ComputeDevice, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two that look for a free buffer at the same time; each hesitates before it takes the one it saw."""
    host = HostMemory(sim)
    uploads = Uploads(sim, host)
    both = threading.Barrier(2, timeout=0.2)
    uploads.send(uploads.stage([torch.zeros(5)]))
    sim.wait()
    seen: list[int] = []
    is_free = Uploads._is_free

    def hesitating(self: Uploads, buffer: Tensor) -> bool:
        answer = is_free(self, buffer)
        with contextlib.suppress(threading.BrokenBarrierError):  # the other has to wait for its turn
            both.wait()
        return answer

    monkeypatch.setattr(Uploads, "_is_free", hesitating)

    def stage(i: int) -> None:
        staged = uploads.stage([torch.full((9,), i)])
        assert staged.buffer is not None
        seen.append(staged.buffer.data_ptr())

    threads = [threading.Thread(target=stage, args=(i,)) for i in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(seen) == 2 == len(set(seen))


@pytest.mark.parametrize(
    ("first", "then", "serves"),
    [(8192, 8192, True), (8192, 8000, True), (8192, 2048, True), (8192, 8448, False), (40_960, 8192, False)],
)
def test_a_buffer_of_another_size_makes_room(sim: ComputeDevice, first: int, then: int, serves: bool) -> None:
    host = HostMemory(sim)
    uploads = Uploads(sim, host)
    uploads.send(uploads.stage([torch.zeros(first, dtype=torch.uint8)]))
    sim.wait()
    uploads.send(uploads.stage([torch.zeros(then, dtype=torch.uint8)]))
    assert host.num_bytes == (first if serves else max(LEAST_BUFFER_BYTES, -(-then // 256) * 256))
    sim.wait()


def test_no_memory_on_the_device_costs_no_buffer(simulated_gpu: SimulatedGpu, sim: ComputeDevice) -> None:
    """As in a step that is tried again: its gathered rows were on their way."""
    host = HostMemory(sim)
    uploads = Uploads(sim, host)
    for _ in range(3):
        staged = uploads.stage_rows(4, 64, lambda rows: rows.fill_(5))
        simulated_gpu.fail_allocation(1)
        with pytest.raises(torch.OutOfMemoryError):
            uploads.send(staged)
    (rows,) = uploads.send(uploads.stage_rows(4, 64, lambda rows: rows.fill_(6)))
    assert rows.shape == (4, 64) and bool((rows == 6).all())
    assert host.num_bytes == LEAST_BUFFER_BYTES


def test_refused_pages_serve_too(simulated_gpu: SimulatedGpu, sim: ComputeDevice) -> None:
    simulated_gpu.refuse_pinning()
    uploads = Uploads(sim, HostMemory(sim))
    for i in range(3):
        assert uploads.send(uploads.stage([torch.full((20,), i)]))[0].tolist() == [i] * 20


@pytest.mark.parametrize("fill", [lambda rows: rows.fill_(7)])
def test_on_a_cpu_nothing_is_copied(fill: Callable[[Tensor], None], monkeypatch: pytest.MonkeyPatch) -> None:
    host = HostMemory(THE_CPU)
    uploads = Uploads(THE_CPU, host)
    sent = uploads.send(uploads.stage(MIXED))
    assert all(found is given for found, given in zip(sent, MIXED, strict=True))
    (rows,) = uploads.send(uploads.stage_rows(2, 3, fill))
    assert rows.tolist() == [[7] * 3] * 2 and host.num_bytes == 0
    assert module.LEAST_BUFFER_BYTES % PIECE_ALIGNMENT_BYTES == 0


def test_a_buffer_is_not_handed_out_while_another_thread_sends_it(sim: ComputeDevice) -> None:
    """One thread asks which buffers are free in the moment in which another queues a copy of one."""
    uploads = Uploads(sim, HostMemory(sim))
    first = uploads.stage([torch.arange(4)])
    uploads.send(first)[0].cpu()  # waits for the copy
    again = uploads.stage([torch.arange(4)])
    assert first.buffer is again.buffer is not None, "with the event of its first copy"
    is_sent, asked, stream = threading.Event(), threading.Event(), sim.side_stream()

    class AskedWhileSending(dict[int, Any]):
        """The other thread may send between the look at the event and the look at what is staged."""

        def get(self, address: int, default: Any = None) -> Any:
            event = super().get(address, default)
            if not sender.is_alive() and not is_sent.is_set():
                sender.start()
                is_sent.wait(timeout=0.5)  # without a lock it sends at once
            return event

    def send() -> None:
        with sim.on(stream):
            (tensor,) = uploads.send(again)
            is_sent.set()
            asked.wait(timeout=5)
            tensor.cpu()  # waits for the copy

    sender = threading.Thread(target=send)
    uploads._under_way = AskedWhileSending(uploads._under_way)
    other = uploads.stage([torch.arange(4)])
    asked.set()
    sender.join()
    assert other.buffer is not again.buffer
