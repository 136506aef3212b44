"""What the simulated GPU refuses: what CUDA refuses and a CPU forgives."""

from __future__ import annotations

import ast
import inspect
import textwrap
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from simulated_gpu import device_module as sim
from simulated_gpu.fixture import SimulatedGpu

INDEXLESS = torch.device("sim")
OTHERS = (
    lambda a, b: a + b,
    lambda a, b: a @ b,
    lambda a, b: torch.cat([a, b]),
    lambda a, b: a.add_(b),
    lambda a, b: torch.nn.functional.linear(a, b),
    lambda a, b: torch.add(a, a, out=b),
)


def test_off_there_is_no_device() -> None:
    assert not torch.accelerator.is_available()
    assert torch.accelerator.current_accelerator(check_available=True) is None
    assert not sim.is_available() and sim.device_count() == 0
    with pytest.raises(RuntimeError, match="no simulated GPU is switched on|'sim' backend"):
        torch.zeros(2, device="sim")
    with pytest.raises(RuntimeError, match="no simulated GPU is switched on"):
        sim.current_device()


def test_on_it_is_the_accelerator(simulated_gpu: SimulatedGpu) -> None:
    assert torch.accelerator.is_available()
    assert torch.accelerator.current_accelerator(check_available=True) == INDEXLESS
    assert torch.get_device_module(simulated_gpu.device) is sim


@pytest.mark.parametrize("name", sim.__all__)
def test_signatures_are_those_of_cuda(name: str) -> None:
    ours, theirs = (inspect.signature(getattr(module, name)) for module in (sim, torch.cuda))
    assert _shape_of(ours) == _shape_of(theirs)


def _shape_of(signature: inspect.Signature) -> list[tuple[Any, ...]]:
    def own_name(default: object) -> object:
        return "sim" if default == "cuda" else default

    return [(p.name, p.kind, own_name(p.default)) for p in signature.parameters.values()]


def test_times_of_events_that_cuda_does_not_tell(simulated_gpu: SimulatedGpu) -> None:
    """Those made without a time, not recorded, not over, or of two devices; nothing is waited for."""
    simulated_gpu.num_devices = 2
    (first, second), x = (sim.Event(enable_timing=True) for _ in range(2)), torch.zeros(3, device="sim")
    first.record()
    with pytest.raises(ValueError, match="enable_timing"):
        first.elapsed_time(sim.current_stream().record_event())
    with pytest.raises(ValueError, match="recorded"):
        first.elapsed_time(second)
    x.add_(1)
    second.record()
    with pytest.raises(RuntimeError, match="not ready"):
        first.elapsed_time(second)
    elsewhere = sim.Event(enable_timing=True)
    elsewhere.record(sim.default_stream(1))
    with pytest.raises(RuntimeError, match="resource handle"):
        first.elapsed_time(elsewhere)
    assert not simulated_gpu.host_reads.synchronizations
    x.tolist()
    assert first.elapsed_time(second) >= 0


@pytest.mark.parametrize("name", ("Stream", "Event"))
def test_methods_of_streams_and_events_are_those_of_cuda(name: str) -> None:
    ours, theirs = getattr(sim, name), getattr(torch.cuda, name)
    for method, function in vars(theirs).items():
        if method.startswith("_") or not callable(function) or not hasattr(ours, method):
            continue
        assert _shape_of(inspect.signature(getattr(ours, method))) == _shape_of(inspect.signature(function))


@pytest.mark.parametrize(
    "function",
    (
        sim.set_device,
        lambda device: sim.set_per_process_memory_fraction(0.5, device),
        sim.get_per_process_memory_fraction,
        lambda device: sim.can_device_access_peer(0, device),
    ),
)
def test_a_device_without_index_is_refused(
    simulated_gpu: SimulatedGpu, function: Callable[[object], object]
) -> None:
    for device in (INDEXLESS, "sim"):
        with pytest.raises(ValueError, match="with a specified index"):
            function(device)


@pytest.mark.parametrize(
    "name",
    (
        "Stream",
        "current_stream",
        "default_stream",
        "synchronize",
        "device",
        "memory_allocated",
        "memory_stats",
        "mem_get_info",
        "reset_peak_memory_stats",
        "get_device_properties",
        "get_device_capability",
        "get_device_name",
    ),
)
def test_elsewhere_it_is_the_current_device(simulated_gpu: SimulatedGpu, name: str) -> None:
    simulated_gpu.num_devices = 2
    sim.set_device(1)
    getattr(sim, name)(INDEXLESS)
    for wrong in (torch.device("cpu"), "cpu", torch.device("meta")):
        with pytest.raises(ValueError, match="Expected a sim device"):
            getattr(sim, name)(wrong)
    no_such = pytest.raises((RuntimeError, AssertionError), match="invalid device ordinal|Invalid device id")
    with no_such, getattr(sim, name)("sim:2"):
        pass


def test_the_current_device_is_the_threads_own(simulated_gpu: SimulatedGpu) -> None:
    from concurrent.futures import ThreadPoolExecutor

    simulated_gpu.num_devices = 2
    sim.set_device("sim:1")
    with ThreadPoolExecutor(1) as pool:
        assert pool.submit(sim.current_device).result() == 0
        assert pool.submit(lambda: sim.current_stream().device).result() == torch.device("sim", 0)
        assert pool.submit(lambda: torch.zeros(1, device="sim").device).result() == torch.device("sim", 0)
    assert sim.current_stream().device == torch.device("sim", 1)
    assert torch.zeros(1, device="sim").device == torch.device("sim", 1)
    with sim.device(0):
        assert sim.current_device() == 0
    with sim.device_of(torch.zeros(1, device="sim:0")), sim.device(-1), sim.device_of(torch.zeros(1)):
        assert sim.current_device() == 0
    assert sim.current_device() == 1


@pytest.mark.parametrize(
    ("name", "optional"),
    (
        ("set_device", False),
        ("set_per_process_memory_fraction", False),
        ("get_per_process_memory_fraction", False),
        ("current_stream", True),
        ("default_stream", True),
        ("device", True),
        ("mem_get_info", True),
        ("get_device_properties", True),
        ("reset_peak_memory_stats", True),
        ("memory_stats_as_nested_dict", True),
    ),
)
def test_the_flags_are_those_of_this_torch(name: str, optional: bool) -> None:
    """What the two tests above take from the source of torch.cuda."""
    [call] = [
        node
        for node in ast.walk(ast.parse(textwrap.dedent(inspect.getsource(getattr(torch.cuda, name)))))
        if isinstance(node, ast.Call) and ast.unparse(node.func) == "_get_device_index"
    ]
    assert any(keyword.arg == "optional" for keyword in call.keywords) == optional


@pytest.mark.parametrize("operate", OTHERS)
@pytest.mark.parametrize("other", ("cpu", "sim:1"))
def test_tensors_of_two_devices_are_refused(
    simulated_gpu: SimulatedGpu, operate: Callable[[Tensor, Tensor], object], other: str
) -> None:
    simulated_gpu.num_devices = 2
    here, there = torch.ones(2, 2, device="sim:0"), torch.ones(2, 2, device=other)
    for pair in ((here, there), (there, here)):
        with pytest.raises(RuntimeError, match="same device"):
            operate(*pair)


@pytest.mark.parametrize(
    "operate",
    (
        lambda x, i: x.index_select(0, i),
        lambda x, i: x.gather(0, i),
        lambda x, i: torch.nn.functional.embedding(i, x.reshape(4, 1)),
        lambda x, i: x.scatter_add(0, i, x),
        lambda x, i: x.cpu()[i.to("sim")],
        lambda x, i: x.index_put_((i.to("sim"),), torch.ones(2)),
    ),
)
def test_indices_on_the_host_are_refused(
    simulated_gpu: SimulatedGpu, operate: Callable[[Tensor, Tensor], object]
) -> None:
    with pytest.raises(RuntimeError, match="same device"):
        operate(torch.ones(4, device="sim"), torch.tensor([0, 1]))


def test_numbers_on_the_host_are_taken_where_cuda_takes_them(simulated_gpu: SimulatedGpu) -> None:
    x, number = torch.ones(3, device="sim"), torch.tensor(2.0)
    assert (x * number).tolist() == [2, 2, 2]
    assert torch.where(x > 0, number, x).tolist() == [2, 2, 2]
    assert x.masked_fill(x > 0, number).tolist() == [2, 2, 2]
    assert (x.to(torch.int32) ^ 3).tolist() == [2, 2, 2]
    with pytest.raises(RuntimeError, match="same device"):
        torch.nn.functional.embedding(torch.tensor(1), x.reshape(3, 1))


def test_products_of_integers_are_refused(simulated_gpu: SimulatedGpu) -> None:
    x = torch.ones(2, 2, dtype=torch.int64, device="sim")
    with pytest.raises(RuntimeError, match="not implemented"):
        x @ x


@pytest.mark.parametrize("said", [None, ":0:0", ":16:8"])
def test_what_cublas_is_told_counts_at_the_first_product(
    simulated_gpu: SimulatedGpu, monkeypatch: pytest.MonkeyPatch, said: str | None
) -> None:
    monkeypatch.delenv("CUBLAS_WORKSPACE_CONFIG", raising=False)
    if said is not None:
        monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", said)
    x = torch.ones(2, 2, device="sim")
    x @ x
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    try:
        torch.use_deterministic_algorithms(True, warn_only=True)
        x @ x
        torch.use_deterministic_algorithms(True)
        if said == ":16:8":
            x @ x
        else:
            with pytest.raises(RuntimeError, match="CUBLAS_WORKSPACE_CONFIG"):
                x @ x
        x + x
    finally:
        torch.use_deterministic_algorithms(False)


def test_what_cannot_be_simulated_raises(simulated_gpu: SimulatedGpu) -> None:
    with pytest.raises(NotImplementedError, match="getPinnedMemoryAllocator"):
        torch.ones(2).pin_memory()
    with pytest.raises(RuntimeError):
        torch.empty(2, pin_memory=True)
    with pytest.raises(RuntimeError):
        torch.Generator("sim")
    with pytest.raises(RuntimeError, match="parameter type"):
        torch.ones(2, device="sim").record_stream(sim.current_stream())  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="convert sim:0"):
        torch.ones(2, device="sim").numpy()


def test_an_event_is_of_one_device(simulated_gpu: SimulatedGpu) -> None:
    simulated_gpu.num_devices = 2
    event = sim.Event()
    event.record(sim.current_stream("sim:0"))
    with pytest.raises(RuntimeError, match="does not match"):
        event.record(sim.current_stream("sim:1"))
    event.wait(sim.current_stream("sim:1"))  # waiting is allowed


def test_an_old_card_has_no_bfloat16(simulated_gpu: SimulatedGpu) -> None:
    assert sim.is_bf16_supported(including_emulation=False)
    simulated_gpu.settings.capability = (7, 5)
    assert not sim.is_bf16_supported(including_emulation=False) and sim.is_bf16_supported()
    assert sim.get_device_capability() == (7, 5)


def test_no_state_outlives_a_simulation(simulated_gpu: SimulatedGpu) -> None:
    """The tests before have left the second device current, and memory in use."""
    assert sim.device_count() == 1 and sim.current_device() == 0
    assert sim.memory_reserved() == 0 and not simulated_gpu.hazards and simulated_gpu.num_operators == 0
