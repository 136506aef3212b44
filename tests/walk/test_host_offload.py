"""Offloaded tensors and offloaded graphs: the same bytes and gradients, and what the device holds
meanwhile."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from qlora_train.device.compute import THE_CPU as CPU
from qlora_train.device.memory_tracker import MemoryTracker
from qlora_train.kernels.dropout import DropoutKeys
from qlora_train.model.linear import FrozenLinear
from qlora_train.model.lora_parameters import LoraParameters
from qlora_train.walk.host_offload import HostOffloader, OffloadedGraph, OffloadedTensor
from qlora_train.weights.host_memory import HostMemory

DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64, torch.int64, torch.uint8, torch.bool]
SHAPES = [(), (1,), (7,), (3, 5), (1, 33, 17), (0,), (4, 0, 3)]


def new_offloader() -> HostOffloader:
    return HostOffloader(CPU, HostMemory(CPU))


def some(shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    return (10 * torch.randn(shape, generator=torch.Generator().manual_seed(len(shape)))).to(dtype)


@pytest.mark.parametrize("fetched", [False, True])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_an_offloaded_tensor_comes_back(shape: tuple[int, ...], dtype: torch.dtype, fetched: bool) -> None:
    offload = new_offloader()
    x = some(shape, dtype)
    expected = x.clone()
    offloaded = offload.offload(x)
    x.zero_()  # what is offloaded is a copy
    if fetched:
        offloaded.fetch()
        offloaded.fetch()
    back = offloaded.take()
    assert back.dtype == dtype and back.shape == shape and torch.equal(back, expected)
    assert back.is_contiguous() and back.data_ptr() != x.data_ptr() or x.numel() == 0


def test_bits_that_no_number_has_come_back_too() -> None:
    x = torch.tensor([0x7FC1, -0x3F, 0x7F80, -0x8000], dtype=torch.int16).view(torch.bfloat16)
    assert torch.equal(new_offloader().offload(x).take().view(torch.int16), x.view(torch.int16))


def test_an_offloaded_tensor_has_no_graph() -> None:
    x = torch.ones(3, requires_grad=True)
    assert not new_offloader().offload(x * 2).take().requires_grad


def test_only_contiguous_tensors_are_offloaded() -> None:
    with pytest.raises(AssertionError):
        new_offloader().offload(torch.ones(3, 5).t())


def test_buffers_are_used_again_but_not_before_they_are_back() -> None:
    offload = new_offloader()
    tensors = [torch.full((100 + k % 7,), float(k)) for k in range(50)]
    first = offload.offload_all(tensors[:5])
    for k in range(5, 50):  # always five out
        assert torch.equal(first.pop(0).take(), tensors[k - 5])
        first.append(offload.offload(tensors[k]))
    assert [torch.equal(p.take(), t) for p, t in zip(first, tensors[45:], strict=True)] == [True] * 5
    assert offload.host.num_bytes <= 5 * 1.25 * 4 * 106


def test_one_buffer_serves_what_leaves_in_turn(monkeypatch: pytest.MonkeyPatch) -> None:
    offload, made = new_offloader(), []
    empty = HostMemory.empty
    monkeypatch.setattr(HostMemory, "empty", lambda self, size: made.append(size) or empty(self, size))
    for k in range(10):
        x = torch.full((100,), float(k))
        assert torch.equal(offload.offload(x).take(), x)
    assert made == [400]


def test_offloaded_bytes_are_on_the_host_and_fetched_ones_on_the_device() -> None:
    offload = new_offloader()
    with MemoryTracker(CPU) as meter:
        x = torch.ones(1000)
        offloaded = offload.offload(x)
        del x
        assert meter.live_bytes == 0 and offload.host.num_bytes == 4000
        offloaded.fetch()
        assert meter.live_bytes == 4000
        back = offloaded.take()
        del offloaded
        assert meter.live_bytes == 4000
        del back
        assert meter.live_bytes == 0


class Weights:
    """A weight source of plain matrices."""

    def __init__(self, weights: dict[str, Tensor]) -> None:
        self.weights = weights

    def dequantize(self, name: str, dtype: torch.dtype) -> Tensor:
        return self.weights[name].to(dtype)


class Block(nn.Module):
    """A small decoder layer with what makes saved tensors awkward: one fused projection cut by `chunk`, views
    by `view` and `transpose`, outputs that are saved (softmax, silu, exp), a mask, indices, a scalar."""

    def __init__(self, width: int, use_autograd: bool, dropout: float) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(width)
        shapes = {
            "qkv": (3 * width, width),
            "o": (width, width),
            "up": (6 * width, width),
            "down": (width, 3 * width),
        }
        source = Weights(
            {
                name: torch.randn(shape, generator=generator) / shape[1] ** 0.5
                for name, shape in shapes.items()
            }
        )
        for name, (num_out, num_in) in shapes.items():
            linear = FrozenLinear(name, num_in, num_out)
            linear.source, linear.use_autograd = source, use_autograd
            self.add_module(name, linear)
        self.norm = nn.Parameter(torch.randn(width, generator=generator), requires_grad=False)
        self.lora = LoraParameters(
            {name: self.get_submodule(name) for name in shapes},
            rank=3,
            scaling=0.5,
            dropout=dropout,
            seed=0,
            dtype=torch.float32,
            device="cpu",
        )
        self.lora.masters.copy_(0.2 * torch.randn(self.lora.masters.shape, generator=generator))

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        num_tokens, width = x.shape[1:]
        normed = F.rms_norm(x, (width,)) * self.norm
        q, k, v = (part.view(1, num_tokens, 2, -1).transpose(1, 2) for part in self.qkv(normed).chunk(3, -1))
        scores = (q @ k.transpose(-1, -2)).masked_fill(mask, float("-inf"))
        x = x + self.o((scores.softmax(-1) @ v).transpose(1, 2).reshape(x.shape))
        gate, up = self.up(x).chunk(2, dim=-1)
        order = torch.arange(num_tokens).flip(0)
        x = x + self.down(F.silu(gate) * up)[:, order]
        return x * (0.01 * x).mean().exp()


NUM_TOKENS, WIDTH = 13, 10
MASK = torch.ones(NUM_TOKENS, NUM_TOKENS, dtype=torch.bool).triu(1)
X = torch.randn(1, NUM_TOKENS, WIDTH, generator=torch.Generator().manual_seed(8))
DIRECTION = torch.randn(1, NUM_TOKENS, WIDTH, generator=torch.Generator().manual_seed(9))


def block(use_autograd: bool = False, dropout: float = 0.0) -> Block:
    made = Block(WIDTH, use_autograd, dropout)
    rows = torch.zeros(NUM_TOKENS, dtype=torch.int64)
    made.lora.dropout_context.tokens = DropoutKeys(3, 5, rows, torch.arange(NUM_TOKENS))
    return made


def stays(module: Block, leaf: Tensor) -> list[Tensor]:
    return [leaf, MASK, module.norm, module.lora.working]


def gradients(module: Block, leaf: Tensor, y: Tensor) -> tuple[Tensor | None, Tensor]:
    module.lora.gradient.zero_()
    y.backward(DIRECTION)
    for linear in module.children():
        if linear.use_autograd:
            linear.lora.collect_autograd()
    return leaf.grad, module.lora.gradient.clone()


@pytest.mark.parametrize("needs_dx", [False, True])
@pytest.mark.parametrize("early", ["fetch", "fetch twice", "no fetch", "leave"])
@pytest.mark.parametrize("dropout", [0.0, 0.25])
@pytest.mark.parametrize("use_autograd", [False, True])
def test_gradients_are_the_same_bits(use_autograd: bool, dropout: float, early: str, needs_dx: bool) -> None:
    module = block(use_autograd, dropout)
    leaf = X.clone().requires_grad_(needs_dx)
    expected_y = module(leaf, MASK)
    expected_dx, expected = gradients(module, leaf, expected_y)
    assert expected.count_nonzero() > 0.9 * expected.numel()

    leaf = X.clone().requires_grad_(needs_dx)
    graph = OffloadedGraph(new_offloader(), stays(module, leaf))
    with graph.recording():
        y = module(leaf, MASK)
    graph.offload()
    for _ in range({"fetch": 1, "fetch twice": 2, "no fetch": 0, "leave": 1}[early]):
        graph.fetch()
    if early == "leave":
        graph.leave_to_autograd()
    grad_input, ours = gradients(module, leaf, y)
    assert torch.equal(y, expected_y) and torch.equal(ours, expected)
    assert (
        (grad_input is None and expected_dx is None) if not needs_dx else torch.equal(grad_input, expected_dx)
    )


def test_several_graphs_share_an_offloader() -> None:
    """Micro-batches of several lengths, offloaded in turn and taken back in turn: buffers are used again."""
    module, offload = block(), new_offloader()
    for _ in range(3):
        runs = []
        for length in (NUM_TOKENS, 4, 9, NUM_TOKENS):
            leaf = X[:, :length].clone().requires_grad_()
            graph = OffloadedGraph(offload, stays(module, leaf))
            with graph.recording():
                runs.append((leaf, module(leaf, MASK[:length, :length]), graph))
            graph.offload()
        for leaf, y, graph in reversed(runs):
            graph.fetch()
            y.sum().backward()
            again = leaf.detach().clone().requires_grad_()
            module(again, MASK[: leaf.shape[1], : leaf.shape[1]]).sum().backward()
            assert torch.equal(leaf.grad, again.grad)


def saved_storages(run: Callable[[], Tensor], staying: list[Tensor]) -> dict[int, int]:
    """Address -> bytes of the storages autograd saves that are numbers and do not stay; by plain hooks."""
    known = {tensor.untyped_storage().data_ptr() for tensor in staying}
    saved: list[Tensor] = []

    def note(tensor: Tensor) -> Tensor:
        saved.append(tensor)
        return tensor.detach()  # an output itself would hold the graph that holds it

    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        y = run()
    sizes = {
        t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in saved if t.is_floating_point()
    }
    assert len(saved) > len(sizes) and y is not None  # some storages are saved more than once
    return {address: size for address, size in sizes.items() if address not in known}


def test_a_storage_is_offloaded_once_however_many_views_are_saved() -> None:
    module = block()
    leaf = X.clone().requires_grad_()
    sizes = saved_storages(lambda: module(leaf, MASK), stays(module, leaf))
    offload = new_offloader()
    graph = OffloadedGraph(offload, stays(module, leaf))
    with graph.recording():
        y = module(leaf, MASK)
    assert offload.host.num_bytes == 0  # nothing leaves before the layer is over
    graph.offload()
    assert offload.host.num_bytes == sum(sizes.values())
    assert y is not None


def test_views_of_one_storage_come_back_as_views_of_one_storage(monkeypatch: pytest.MonkeyPatch) -> None:
    offload, taken = new_offloader(), []
    take = OffloadedTensor.take
    monkeypatch.setattr(OffloadedTensor, "take", lambda self: taken.append(self) or take(self))
    base = torch.randn(6, 8, requires_grad=True)
    graph = OffloadedGraph(offload, [base])
    with graph.recording():
        fused = base * 2
        a, b = fused.chunk(2, dim=1)
        y = (a.t() @ b).sum() + (fused.view(3, 16)[1:, ::2] ** 2).sum()
    del fused, a, b
    graph.offload()
    assert offload.host.num_bytes == 6 * 8 * 4
    with MemoryTracker(CPU) as meter:
        graph.fetch()
        assert meter.live_bytes == 6 * 8 * 4
    y.backward()
    assert len(taken) == 1
    again = base.detach().clone().requires_grad_()
    fused = again * 2
    a, b = fused.chunk(2, dim=1)
    ((a.t() @ b).sum() + (fused.view(3, 16)[1:, ::2] ** 2).sum()).backward()
    assert torch.equal(base.grad, again.grad)


@pytest.mark.parametrize("dropout", [0.0, 0.25])
def test_the_device_keeps_only_what_stays(dropout: float) -> None:
    module = block(dropout=dropout)
    leaf = X.clone().requires_grad_()
    numbers = sum(saved_storages(lambda: module(leaf, MASK), stays(module, leaf)).values())
    offload = new_offloader()
    with MemoryTracker(CPU) as meter:
        graph = OffloadedGraph(offload, stays(module, leaf))
        with graph.recording():
            y = module(leaf, MASK)
        kept = meter.live_bytes
        assert kept >= numbers
        graph.offload()
        order = NUM_TOKENS * 8  # the indices: int64, saved as they are
        assert meter.live_bytes == y.nbytes + order
        graph.fetch()
        # As before, but for y, which is not saved itself.
        assert meter.live_bytes == y.nbytes + order + numbers == kept
        graph.leave_to_autograd()
        y.backward(DIRECTION)
        del y, graph
        assert meter.live_bytes == leaf.grad.nbytes
        leaf.grad = None
        assert meter.live_bytes == 0


def test_what_is_left_to_autograd_goes_with_the_last_that_saved_it() -> None:
    """A chain: when its gradient is half-way back, half of it is gone."""
    num_bytes, seen = 40_000, []
    leaf = torch.randn(num_bytes // 4, requires_grad=True)
    graph = OffloadedGraph(new_offloader(), [leaf])
    with MemoryTracker(CPU) as meter:
        x = leaf
        with graph.recording():
            for _ in range(8):
                x = x.tanh()  # saves its result
                x.register_hook(lambda gradient: seen.append(meter.live_bytes // num_bytes))
        y = x.sum()
        del x
        graph.offload()
        assert meter.live_bytes < num_bytes
        graph.fetch()
        graph.leave_to_autograd()
        y.backward()
    assert len(seen) == 8
    assert seen == sorted(seen, reverse=True) and seen[0] - seen[-1] >= 6


def test_a_graph_that_is_never_taken_back_gives_its_bytes_back() -> None:
    module, offload = block(), new_offloader()
    leaf = X.clone().requires_grad_()
    graph = OffloadedGraph(offload, stays(module, leaf))
    with graph.recording():
        y = module(leaf, MASK)
    graph.offload()
    assert offload.host.num_bytes > 0
    del y, graph
    assert offload.host.num_bytes == 0


def test_a_graph_may_be_taken_back_twice() -> None:
    leaf = torch.randn(5, 3, requires_grad=True)
    graph = OffloadedGraph(new_offloader(), [leaf])
    with graph.recording():
        y = leaf.exp().sum()
    graph.offload()
    (first,) = torch.autograd.grad(y, leaf, retain_graph=True)
    (second,) = torch.autograd.grad(y, leaf)
    assert torch.equal(first, leaf.exp()) and torch.equal(second, first)


def test_what_stays_is_not_moved() -> None:
    """Also a view of it; and whatever is not a number."""
    weights = torch.randn(4, 6)
    leaf = torch.randn(2, 3, requires_grad=True)
    offload = new_offloader()
    graph = OffloadedGraph(offload, [weights, leaf])
    with graph.recording():
        y = (leaf @ weights[:3, 2:])[:, torch.tensor([1, 0])] * weights[0, :2]
    graph.offload()
    assert offload.host.num_bytes == 0
    y.sum().backward()
    assert leaf.grad is not None
