"""bitsandbytes on the simulated GPU: its operators and optimizers have the CPU's bits, its managed memory is
guarded where the driver has no concurrent access."""

from __future__ import annotations

from collections.abc import Callable

import bitsandbytes as bnb
import pytest
import torch
from bitsandbytes import functional
from torch import Tensor

from simulated_gpu import device_module as sim
from simulated_gpu.fixture import SimulatedGpu

ENOUGH_TO_BE_PAGED = 100_352


def weight() -> Tensor:
    return torch.randn(64, 128, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("quant_type", ("nf4", "fp4"))
@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16, torch.float16))
@pytest.mark.parametrize("nested", (False, True))
def test_4bit_has_the_cpus_bits(
    simulated_gpu: SimulatedGpu, quant_type: str, dtype: torch.dtype, nested: bool
) -> None:
    results = []
    for device in ("cpu", "sim"):
        packed, state = functional.quantize_4bit(
            weight().to(device, dtype), quant_type=quant_type, compress_statistics=nested
        )
        out = functional.dequantize_4bit(packed, state)
        assert packed.device.type == out.device.type == device
        if device == "sim":  # which a CPU does not offer
            given = torch.empty_like(out)
            functional.dequantize_4bit(packed, state, out=given)
            assert torch.equal(out, given)
        results.append([t.cpu() for t in (packed, state.absmax, out)])
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


def test_8bit_has_the_cpus_bits(simulated_gpu: SimulatedGpu) -> None:
    results = []
    for device in ("cpu", "sim"):
        packed, state = functional.quantize_blockwise(weight().to(device))
        rows, row_scales, _ = functional.int8_vectorwise_quant(weight().to(device, torch.float16))
        back = functional.dequantize_blockwise(packed, state)
        results.append([t.cpu() for t in (packed, state.absmax, back, rows, row_scales)])
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


def test_product_with_4bit_weights(simulated_gpu: SimulatedGpu) -> None:
    results = []
    for device in ("cpu", "sim"):
        packed, state = functional.quantize_4bit(weight().to(device), quant_type="nf4")
        x = torch.ones(3, 128, device=device, requires_grad=True)
        y = bnb.matmul_4bit(x, packed.t(), state)
        y.sum().backward()
        assert x.grad is not None
        results.append([y.detach().cpu(), x.grad.cpu()])
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


@pytest.mark.filterwarnings("ignore:Paged optimizers are not supported on CPU")
@pytest.mark.parametrize(
    "make", (bnb.optim.AdamW, bnb.optim.AdamW8bit, bnb.optim.PagedAdamW32bit, bnb.optim.PagedAdamW8bit)
)
def test_optimizers_have_the_cpus_bits(
    simulated_gpu: SimulatedGpu, make: Callable[..., torch.optim.Optimizer]
) -> None:
    results = []
    for device in ("cpu", "sim"):
        generator = torch.Generator().manual_seed(1)
        p = torch.nn.Parameter(torch.randn(ENOUGH_TO_BE_PAGED, generator=generator).to(device))
        optimizer = make([p], lr=0.01)
        for _ in range(3):
            p.grad = torch.randn(ENOUGH_TO_BE_PAGED, generator=generator).to(device)
            optimizer.step()
        results.append(p.detach().cpu())
        is_paged = getattr(optimizer.state[p]["state1"], "is_paged", False)
        assert is_paged == (device == "sim" and "Paged" in make.__name__)
    assert torch.equal(*results)
    assert bool(simulated_gpu.num_prefetches) == ("Paged" in make.__name__)


def paged_state() -> Tensor:
    state: Tensor = functional.get_paged(1000, dtype=torch.float32, device=torch.device("sim", 0))
    functional.fill(state, 0)
    return state


def test_the_optimizer_waits_for_the_device(simulated_gpu: SimulatedGpu) -> None:
    """As bitsandbytes does for CUDA, at the end of each step."""
    simulated_gpu.settings.concurrent_managed_access = False
    p = torch.nn.Parameter(torch.ones(ENOUGH_TO_BE_PAGED, device="sim"))
    optimizer = bnb.optim.PagedAdamW32bit([p], lr=0.01)
    p.grad = torch.ones_like(p)
    optimizer.step()
    state = optimizer.state[p]["state1"]
    assert state[0].item() == pytest.approx(0.1) and state.numpy()[1] == pytest.approx(0.1)


@pytest.mark.parametrize(
    "touch",
    (
        lambda state: state.clone(),
        lambda state: state.numpy().sum(),
        lambda state: state.fill_(1),
        lambda state: torch.save(state.clone(), "/dev/null"),
        lambda state: bytes(memoryview(state.numpy())),
    ),
)
def test_managed_memory_touched_while_the_device_works(
    simulated_gpu: SimulatedGpu, touch: Callable[[Tensor], object]
) -> None:
    simulated_gpu.settings.concurrent_managed_access = False
    state, x = paged_state(), torch.ones(1000, device="sim")
    x.add_(1)  # the driver does not ask whether it concerns this memory
    touch(state)
    [hazard] = simulated_gpu.take_hazards()
    assert "managed memory" in hazard and ("test_libraries.py:" in hazard or "numpy" in hazard)
    x.add_(1)
    sim.synchronize()
    touch(state)
    assert not simulated_gpu.hazards


def test_managed_memory_is_open_where_access_is_concurrent(simulated_gpu: SimulatedGpu) -> None:
    state, x = paged_state(), torch.ones(1000, device="sim")
    x.add_(1)
    assert state.sum().item() == 0


@pytest.mark.parametrize(
    "wait",
    (
        lambda x: x.sum().item(),
        lambda x: x.cpu(),
        lambda x: sim.synchronize(),
        lambda x: sim.current_stream().synchronize(),
        lambda x: sim.current_stream().record_event().synchronize(),
    ),
)
def test_waits_open_managed_memory(simulated_gpu: SimulatedGpu, wait: Callable[[Tensor], object]) -> None:
    simulated_gpu.settings.concurrent_managed_access = False
    state, x = paged_state(), torch.ones(1000, device="sim")
    x.add_(1)
    wait(x)
    assert state.sum().item() == 0


def test_a_stream_that_was_not_waited_for_keeps_it_closed(simulated_gpu: SimulatedGpu) -> None:
    simulated_gpu.settings.concurrent_managed_access = False
    state, x, side = paged_state(), torch.ones(1000, device="sim"), sim.Stream()
    side.wait_stream(sim.current_stream())
    with sim.stream(side):
        x.add_(1)
    sim.default_stream().synchronize()
    state.sum()
    assert len(simulated_gpu.take_hazards()) == 1
    side.synchronize()


def test_other_devices_tensors_are_still_refused(simulated_gpu: SimulatedGpu) -> None:
    packed, state = functional.quantize_4bit(weight().to("sim"), quant_type="nf4")
    state.absmax = state.absmax.cpu()
    with pytest.raises(RuntimeError, match="same device"):
        functional.dequantize_4bit(packed, state)
