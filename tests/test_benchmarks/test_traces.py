"""Tables of a traced step, from traces and snapshots as a GPU gives them."""

from __future__ import annotations

import gzip
import json
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from benchmarks.gpu_suite import traces
from benchmarks.gpu_suite.traces import Tracer, allocator_table, kind_of, profile_table
from simulated_gpu.fixture import SimulatedGpu

from qlora_train.device.compute import THE_CPU
from qlora_train.kernels.on_device import find_device


def event(category: str, name: str, start: float, duration: float, stream: int = 7) -> dict[str, Any]:
    return {"ph": "X", "cat": category, "name": name, "ts": start, "dur": duration, "pid": 0, "tid": stream}


def test_kernels_are_shares_of_the_step_and_streams_overlap() -> None:
    events = [
        {"ph": "M", "name": "process_name", "pid": 0},
        event("cpu_op", "aten::mm", 0, 5000, 1),
        event("kernel", "nvjet_sm90_tst_128x256", 1000, 400),
        event("kernel", "nvjet_sm90_tst_128x256", 1500, 100),
        event("gpu_memcpy", "Memcpy HtoD (Pinned -> Device)", 1200, 600, 13),
        event("kernel", "flash_bwd_dq_dk_dv", 1900, 100),
    ]
    table = profile_table(events)
    assert table["step_milliseconds"] == 1.0
    assert table["busy_share"] == pytest.approx(0.9)  # 1,000 to 1,800, and 1,900 to 2,000
    assert table["num_kernels"] == 4 and table["kernel_milliseconds"] == pytest.approx(1.2)
    assert table["kernels"][:2] == [
        ["Memcpy HtoD (Pinned -> Device)", 1, 0.6, 0.6],
        ["nvjet_sm90_tst_128x256", 2, 0.5, 0.5],
    ]
    assert table["kinds"] == {"copies": 0.6, "matrix products": 0.5, "attention": 0.1}


def test_without_an_accelerator_the_outermost_operators_count() -> None:
    events = [
        event("cpu_op", "aten::linear", 0, 60, 1),
        event("cpu_op", "aten::addmm", 10, 40, 1),
        event("cpu_op", "aten::add", 60, 40, 1),
    ]
    assert [kernel[:2] for kernel in profile_table(events)["kernels"]] == [
        ["aten::linear", 1],
        ["aten::add", 1],
    ]
    assert profile_table([])["kernels"] == []


@pytest.mark.parametrize(
    ("kernel", "kind"),
    [
        ("void cutlass::Kernel2<cutlass_80_tensorop_bf16_s16816gemm_relu_bf16_64x64>", "matrix products"),
        ("void pytorch_flash::flash_fwd_kernel<Flash_fwd_kernel_traits>", "attention"),
        ("_dequantize_4bit_kernel", "dequantizing"),
        ("void kDequantizeBlockwise<__nv_bfloat16, 512, 64, 8, 2>", "dequantizing"),
        ("void at::native::vectorized_elementwise_kernel<4, at::native::FillFunctor>", "other"),
    ],
)
def test_kinds_of_kernels(kernel: str, kind: str) -> None:
    assert kind_of(kernel) == kind


def frame(filename: str, line: int, name: str) -> dict[str, Any]:
    return {"filename": filename, "line": line, "name": name}


def allocation(address: int, size: int, *frames: dict[str, Any], action: str = "alloc") -> dict[str, Any]:
    return {"action": action, "addr": address, "size": size, "stream": 0, "frames": list(frames)}


TORCH = frame("/site/torch/functional.py", 5, "linear")
OURS = frame("/x/qlora_train/model/linear.py", 120, "dequantize")
SNAPSHOT: dict[str, Any] = {
    "segments": [
        {
            "device": 0,
            "total_size": 1000,
            "allocated_size": 300,
            "blocks": [{"size": 300, "state": "active_allocated"}, {"size": 700, "state": "inactive"}],
        },
        {"device": 1, "total_size": 5, "allocated_size": 5, "blocks": []},
    ],
    "device_traces": [
        [
            allocation(1, 100, TORCH, OURS),
            allocation(2, 50, TORCH),
            allocation(9, 40, action="free_completed"),  # made before
            allocation(2, 50, action="free_completed"),
            allocation(0, 2**21, action="segment_alloc"),
            allocation(3, 200, OURS),
            allocation(4, 30),
            allocation(1, 100, action="free_completed"),
            allocation(5, 20, OURS),
        ],
        [],
    ],
}


def test_who_held_what_at_the_peak() -> None:
    table = allocator_table(SNAPSHOT, 0)
    assert (table["reserved_bytes"], table["allocated_bytes"]) == (1000, 300)
    assert (table["largest_free_bytes"], table["num_segments"]) == (700, 1)
    assert table["peak_bytes"] == 100 - 40 + 200 + 30
    assert table["held_at_peak"] == [["model/linear.py:120 dequantize", 300], ["unknown", 30]]


class History:
    """Stands for `torch.cuda.memory`, with its signatures."""

    def __init__(self) -> None:
        self.enabled: list[str | None] = []

    def _record_memory_history(
        self, enabled: str | None = "all", *, stacks: str = "all", max_entries: int = 0
    ) -> None:
        self.enabled.append(enabled)

    def _snapshot(self, device: Any = None) -> dict[str, Any]:
        return SNAPSHOT


def test_two_steps_are_traced_one_after_the_other(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, simulated_gpu: SimulatedGpu
) -> None:
    history, here = History(), simulated_gpu.device
    monkeypatch.setattr(Tracer, "_memory", lambda self: history)
    tracer = Tracer(find_device(here), tmp_path / "out", "x")
    for _ in range(3):
        tracer.next_step()
        torch.ones(8, 8, device=here) @ torch.ones(8, 8, device=here)
    assert history.enabled == ["all", None]
    assert tracer.figures["profile"]["kernels"] and tracer.figures["allocator"]["peak_bytes"] == 290
    trace = json.loads(gzip.decompress((tmp_path / "out" / "x.trace.json.gz").read_bytes()))
    assert any(e.get("name") == "aten::mm" or e.get("name") == "aten::matmul" for e in trace["traceEvents"])
    quantized = gzip.decompress((tmp_path / "out" / "x.snapshot.pickle.gz").read_bytes())
    assert quantized == pickle.dumps(SNAPSHOT) and tracer.remarks == []


def test_what_is_too_large_to_take_away_is_left_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(traces, "MAX_FILE_BYTES", 1000)
    tracer = Tracer(THE_CPU, tmp_path, "x")
    contents = [bytes(range(256)) * 40_000, b"short"]
    tracer._keep(tmp_path / "first.gz", iter(contents))
    assert gzip.decompress((tmp_path / "first.gz").read_bytes()) == b"short"
    tracer._keep(tmp_path / "second.gz", iter(contents[:1]))
    assert not (tmp_path / "second.gz").exists() and "second.gz would be" in tracer.remarks[0]


def test_nothing_is_traced_where_nothing_was_asked_for(tmp_path: Path) -> None:
    tracer = Tracer(THE_CPU, tmp_path, None)
    tracer.next_step()
    assert tracer.figures == {} and list(tmp_path.iterdir()) == []
