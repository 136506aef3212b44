"""Operators, copies and gradients on the simulated GPU have the CPU's bits."""

from __future__ import annotations

import copy
import io
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from simulated_gpu import device_module as sim
from simulated_gpu.fixture import SimulatedGpu

OPERATORS: dict[str, Callable[[Tensor], Tensor]] = {
    "linear": lambda x: F.linear(x, x, x[0]),
    "softmax": lambda x: F.softmax(x, -1),
    "silu": F.silu,
    "gelu": F.gelu,
    "layer_norm": lambda x: F.layer_norm(x, (x.shape[-1],), x[0], x[1]),
    "rms_norm": lambda x: F.rms_norm(x, (x.shape[-1],), x[0]),
    "cross_entropy": lambda x: F.cross_entropy(x, torch.arange(x.shape[0], device=x.device)),
    "stack": lambda x: torch.stack([x, x.t()]).sum(0),
    "cat": lambda x: torch.cat([x[:3], x[2:]]),
    "index": lambda x: x[torch.tensor([0, 2, 2], device=x.device)],
    "mask": lambda x: x[x > 0],
    "gather": lambda x: x.gather(0, torch.zeros(3, 3, dtype=torch.int64, device=x.device)),
    "index_add": lambda x: x.index_add(0, torch.tensor([1, 1], device=x.device), x[:2]),
    "einsum": lambda x: torch.einsum("ij,kj->ik", x, x),
    "rotate": lambda x: torch.cat([-x[:, 4:], x[:, :4]], -1) * x.cos(),
    "norm": lambda x: torch.linalg.vector_norm(x),
    "cumsum": lambda x: x.cumsum(0),
    "roll": lambda x: x.roll(1, 0),
    "chunk": lambda x: x.chunk(2, -1)[1] * 2,
    "repeat": lambda x: x.repeat_interleave(2, 0),
    "foreach": lambda x: torch.stack(torch._foreach_mul([x, x * 2], 2.0)),
    "half": lambda x: (x.bfloat16() @ x.bfloat16().t()).float(),
}


def source(dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(8, 8, generator=torch.Generator().manual_seed(0)).to(dtype)


@pytest.mark.parametrize("name", OPERATORS)
def test_forward_and_gradient(simulated_gpu: SimulatedGpu, name: str) -> None:
    results = []
    for device in ("cpu", "sim"):
        x = source().to(device).requires_grad_()
        y = OPERATORS[name](x)
        (y * y).sum().backward()
        assert x.grad is not None and y.device == x.device == x.grad.device
        results.append((y.detach().cpu(), x.grad.cpu()))
    for ours, theirs in zip(*results, strict=True):
        assert torch.equal(ours, theirs)


@pytest.mark.parametrize(
    "dtype", (torch.float32, torch.float16, torch.bfloat16, torch.float64, torch.complex64)
)
def test_copies_of_every_kind(simulated_gpu: SimulatedGpu, dtype: torch.dtype) -> None:
    x = source(dtype)
    y = x.to("sim")
    assert y.dtype == dtype and torch.equal(y.cpu(), x) and torch.equal(y.t().cpu(), x.t())
    y[2:4, ::2].copy_(x[:2, :4])
    assert torch.equal(y[2:4, ::2].cpu(), x[:2, :4])
    y[0].copy_(x[3, 0])  # broadcast
    assert torch.equal(y[0].cpu(), x[3, 0].expand(8))
    assert torch.equal(y.to(torch.float64 if dtype != torch.complex64 else dtype).to(dtype).cpu(), y.cpu())
    host = torch.zeros(8, 8, dtype=torch.float64 if dtype != torch.complex64 else dtype)
    host.copy_(y)
    assert torch.equal(host, y.cpu().to(host.dtype))


def test_bool_and_int_types(simulated_gpu: SimulatedGpu) -> None:
    for dtype in (torch.bool, torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64):
        x = torch.tensor([0, 1, 1], dtype=dtype, device="sim")
        assert x.dtype == dtype and x.tolist() == [0, 1, 1]
        assert x.view(torch.uint8).numel() == 3 * dtype.itemsize
    a, b = torch.tensor([1, 2], device="sim"), torch.tensor([1, 3], device="sim")
    assert (a == b).tolist() == [True, False] and (a == b).dtype == torch.bool


def test_in_place_and_out(simulated_gpu: SimulatedGpu) -> None:
    x = torch.arange(6.0, device="sim").view(2, 3)
    returned = x.add_(1)
    assert returned is x
    out = torch.empty(2, 2, device="sim")
    assert torch.mm(x, x.t(), out=out) is out
    assert torch.equal(out.cpu(), x.cpu() @ x.cpu().t())
    x[:, 1] = 0
    x[x > 4] = -1
    x.masked_fill_(x < 0, 9.0)
    x.t().mul_(2)
    assert x.tolist() == [[2, 0, 6], [8, 0, 18]]
    y, z = x.split([1, 2], dim=1)
    z.zero_()
    assert x.tolist() == [[2, 0, 0], [8, 0, 0]] and y.tolist() == [[2], [8]]
    a, b = torch.ones(2, device="sim"), torch.ones(2, device="sim")
    torch._foreach_add_([a, b], 1.0)
    assert a.tolist() == b.tolist() == [2, 2]


def test_a_model_learns_the_same(simulated_gpu: SimulatedGpu) -> None:
    weights = []
    for device in ("cpu", "sim"):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(8, 16), nn.SiLU(), nn.LayerNorm(16), nn.Linear(16, 4)).to(device)
        optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
        for _ in range(3):
            loss = F.cross_entropy(model(source().to(device)), torch.arange(8, device=device) % 4)
            optimizer.zero_grad()
            loss.backward()
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
        weights.append([p.detach().cpu() for p in model.parameters()])
    assert all(torch.equal(a, b) for a, b in zip(*weights, strict=True))


def test_autograd_functions_and_hooks(simulated_gpu: SimulatedGpu) -> None:
    class Double(torch.autograd.Function):
        @staticmethod
        def forward(ctx: torch.autograd.function.FunctionCtx, x: Tensor) -> Tensor:
            return x * 2

        @staticmethod
        def backward(ctx: torch.autograd.function.FunctionCtx, gradient: Tensor) -> Tensor:
            assert gradient.device.type == "sim"
            return gradient * 2

    x = torch.ones(3, device="sim", requires_grad=True)
    seen: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: t.cpu(), lambda t: t.to("sim")):
        y = Double.apply(x).exp()
    y.register_hook(seen.append)
    (gradient,) = torch.autograd.grad(y.sum(), x)
    assert torch.equal(gradient.cpu(), 2 * (2 * torch.ones(3)).exp()) and seen[0].device.type == "sim"


def test_random_numbers_are_the_cpus(simulated_gpu: SimulatedGpu) -> None:
    torch.manual_seed(3)
    ours = (
        torch.rand(4, device="sim"),
        torch.randperm(4, device="sim"),
        F.dropout(torch.ones(9, device="sim")),
    )
    torch.manual_seed(3)
    theirs = torch.rand(4), torch.randperm(4), F.dropout(torch.ones(9))
    assert all(torch.equal(a.cpu(), b) for a, b in zip(ours, theirs, strict=True))
    state = sim.get_rng_state()
    first = torch.rand(2, device="sim")
    sim.set_rng_state(state)
    assert torch.equal(first, torch.rand(2, device="sim"))


def test_saving_and_loading(simulated_gpu: SimulatedGpu) -> None:
    from safetensors.torch import load, save

    x = source().to("sim")
    assert torch.equal(load(save({"x": x.cpu()}))["x"], x.cpu())
    file = io.BytesIO()
    torch.save({"x": x.cpu()}, file)
    file.seek(0)
    assert torch.equal(torch.load(file, weights_only=True)["x"], x.cpu())


def test_copies_of_storages(simulated_gpu: SimulatedGpu) -> None:
    """Which torch makes without asking the dispatcher."""
    x = source().to("sim")
    again = copy.deepcopy(x)
    assert torch.equal(again.cpu(), x.cpu()) and again.data_ptr() != x.data_ptr()
    layer = copy.deepcopy(nn.Linear(8, 8).to("sim"))
    assert layer.weight.device == x.device
    file = io.BytesIO()
    torch.save(x, file)
    file.seek(0)
    assert torch.equal(torch.load(file, weights_only=True).cpu(), x.cpu())
    before = simulated_gpu.live_bytes()
    storage = torch.UntypedStorage(1000, device="sim")
    assert storage.device == x.device and simulated_gpu.live_bytes() == before + 1024
    x.set_()  # type: ignore[call-overload]
    assert x.numel() == 0


def test_recomputing_draws_the_same(simulated_gpu: SimulatedGpu) -> None:
    from torch.utils.checkpoint import checkpoint

    x = torch.ones(50, device="sim", requires_grad=True)
    y = checkpoint(F.dropout, x, use_reentrant=False)
    y.sum().backward()
    assert x.grad is not None and torch.equal(x.grad.cpu(), y.detach().cpu())


def test_forward_on_a_second_device(simulated_gpu: SimulatedGpu) -> None:
    simulated_gpu.num_devices = 2
    layer = nn.Linear(8, 8).to("sim:1")
    with torch.no_grad():
        there = F.silu(layer(source().to("sim:1")))
    assert there.device == torch.device("sim", 1)
    assert torch.equal(there.to("sim:0").cpu(), there.cpu())
