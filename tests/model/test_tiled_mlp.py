"""An MLP in token tiles has the output and the gradients of the MLP at once."""

from __future__ import annotations

from collections.abc import Iterable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from qlora_train.device.compute import THE_CPU
from qlora_train.device.memory_tracker import MemoryTracker
from qlora_train.kernels.dropout import DropoutKeys
from qlora_train.model.linear import FrozenLinear
from qlora_train.model.lora_parameters import LoraParameters
from qlora_train.model.tiled_mlp import TiledMlp

NUM_TOKENS, WIDTH, INNER = 23, 12, 31
LINEARS = {"gate": (INNER, WIDTH), "up": (INNER, WIDTH), "down": (WIDTH, INNER)}
TILES = [1, 5, 22, 23, 24, 1000]
DROPOUT = 0.3


class Weights:
    def __init__(self) -> None:
        generator = torch.Generator().manual_seed(4)
        self.weights = {
            name: torch.randn(shape, generator=generator) / shape[1] ** 0.5 for name, shape in LINEARS.items()
        }
        self.asked: list[str] = []

    def dequantize(self, name: str, dtype: torch.dtype) -> Tensor:
        self.asked.append(name)
        return self.weights[name].to(dtype)


class Mlp(nn.Module):
    """A gated MLP; remembers how many tokens it was given at a time."""

    def __init__(self) -> None:
        super().__init__()
        self.source = Weights()
        for name, (num_out, num_in) in LINEARS.items():
            linear = FrozenLinear(name, num_in, num_out)
            linear.source = self.source
            self.add_module(name, linear)
        self.num_tokens: list[int] = []

    def forward(self, x: Tensor) -> Tensor:
        self.num_tokens.append(x.shape[1])
        return self.down(F.silu(self.gate(x)) * self.up(x))


class Case:
    """An MLP with factors on `targets`."""

    def __init__(
        self,
        dropout: float = 0.0,
        targets: Iterable[str] = LINEARS,
        use_autograd: bool = False,
        may_skip: bool = True,
    ) -> None:
        generator = torch.Generator().manual_seed(5)

        def randn(*shape: int) -> Tensor:
            return torch.randn(shape, generator=generator)

        self.mlp = Mlp()
        linears = {name: self.mlp.get_submodule(name) for name in LINEARS}
        self.linears = list(linears.values())
        for linear in self.linears:
            linear.use_autograd = use_autograd
        self.lora = LoraParameters(
            {name: linears[name] for name in targets},
            rank=3,
            scaling=0.5,
            dropout=dropout,
            seed=0,
            dtype=torch.float32,
            device="cpu",
        )
        self.lora.masters.copy_(0.3 * randn(len(self.lora.masters)))
        rows = torch.arange(NUM_TOKENS) // 9
        self.keys = DropoutKeys(3, 5, rows, torch.arange(NUM_TOKENS) % 9)
        self.lora.dropout_context.tokens = self.keys if dropout else None
        self.tiled = TiledMlp(self.mlp, self.lora.dropout_context, linears["down"] if may_skip else None)
        self.x, self.direction = randn(1, NUM_TOKENS, WIDTH), randn(1, NUM_TOKENS, WIDTH)

    def run(
        self, tile_tokens: int | None, *, needs_dx: bool = True, skips: bool = False
    ) -> tuple[Tensor, Tensor | None, Tensor]:
        """(y, dx, flat gradient)"""
        self.tiled.tile_tokens, self.tiled.skip_output = tile_tokens, skips
        self.lora.gradient.zero_()
        x = self.x.clone().requires_grad_(needs_dx)
        y = self.tiled(x)
        keys = self.lora.dropout_context.tokens
        self.lora.dropout_context.tokens = None  # backward has the forward's keys
        y.backward(self.direction)
        self.lora.dropout_context.tokens = keys
        for linear in self.linears:
            if linear.lora is not None:
                linear.lora.collect_autograd()
        return y.detach(), x.grad, self.lora.gradient.clone()


def assert_close(ours: Tensor | None, expected: Tensor | None) -> None:
    if ours is None or expected is None:
        assert ours is expected
    else:
        assert ours.shape == expected.shape and expected.count_nonzero() > 0
        assert (ours - expected).norm() <= 1e-6 * expected.norm()


@pytest.mark.parametrize("use_autograd", [False, True], ids=["auto", "reference"])
@pytest.mark.parametrize("dropout", [0.0, DROPOUT])
@pytest.mark.parametrize("needs_dx", [False, True])
@pytest.mark.parametrize("tile_tokens", TILES)
def test_output_and_every_gradient(
    tile_tokens: int, needs_dx: bool, dropout: float, use_autograd: bool
) -> None:
    case = Case(dropout, use_autograd=use_autograd)
    expected = case.run(None, needs_dx=needs_dx)
    ours = case.run(tile_tokens, needs_dx=needs_dx)
    for mine, theirs in zip(ours, expected, strict=True):
        assert_close(mine, theirs)
    assert (ours[1] is not None) == needs_dx
    assert ours[2].count_nonzero() > 0.9 * ours[2].numel()


@pytest.mark.parametrize("targets", [["gate"], ["up"], ["down"], ["gate", "down"]], ids=str)
@pytest.mark.parametrize("needs_dx", [False, True])
@pytest.mark.parametrize("use_autograd", [False, True], ids=["auto", "reference"])
def test_factors_on_some_linears(targets: list[str], needs_dx: bool, use_autograd: bool) -> None:
    case = Case(DROPOUT, targets, use_autograd)
    for mine, theirs in zip(case.run(5, needs_dx=needs_dx), case.run(None, needs_dx=needs_dx), strict=True):
        assert_close(mine, theirs)


def test_an_mlp_without_factors() -> None:
    case = Case(targets=["down"])
    case.mlp.down.lora = None
    tiled = TiledMlp(case.mlp, case.lora.dropout_context, case.mlp.down)
    gradients = []
    for tiled.tile_tokens in (None, 5):
        x = case.x.clone().requires_grad_()
        tiled(x).backward(case.direction)
        gradients.append(x.grad)
    assert_close(gradients[1], gradients[0])


@pytest.mark.parametrize("dropout", [0.0, DROPOUT])
@pytest.mark.parametrize("needs_dx", [False, True])
@pytest.mark.parametrize("tile_tokens", TILES)
def test_a_skipped_value_changes_no_gradient(tile_tokens: int, needs_dx: bool, dropout: float) -> None:
    case = Case(dropout)
    _, grad_input, gradient = case.run(tile_tokens, needs_dx=needs_dx)
    case.mlp.num_tokens.clear()
    y, skipped_dx, skipped_gradient = case.run(tile_tokens, needs_dx=needs_dx, skips=True)
    assert y.shape == case.x.shape and y.count_nonzero() == 0
    assert torch.equal(skipped_gradient, gradient)
    assert (
        (grad_input is None and skipped_dx is None) if not needs_dx else torch.equal(skipped_dx, grad_input)
    )
    assert len(case.mlp.num_tokens) == -(-NUM_TOKENS // tile_tokens)  # in backward only
    assert_close(case.run(None, needs_dx=needs_dx)[0], case.run(tile_tokens, needs_dx=needs_dx)[0])


@pytest.mark.parametrize("may_skip", [False, True])
def test_backward_skips_the_last_linear_where_it_may(may_skip: bool) -> None:
    case = Case(may_skip=may_skip)
    case.run(8)
    num_tiles = 3
    # Once in forward, once for its input's gradient; and its value again if that may not be skipped.
    assert case.mlp.source.asked.count("down") == num_tiles * (2 if may_skip else 3)
    assert case.mlp.source.asked.count("gate") == num_tiles * 3
    assert not case.mlp.down.skip_output


@pytest.mark.parametrize(
    ("tile_tokens", "sizes"), [(5, [5, 5, 5, 5, 3]), (23, [23]), (99, [23]), (22, [22, 1])]
)
def test_tokens_pass_a_tile_at_a_time(tile_tokens: int, sizes: list[int]) -> None:
    case = Case()
    case.run(tile_tokens)
    assert case.mlp.num_tokens == [*sizes, *sizes]
    case.mlp.num_tokens.clear()
    case.run(None)
    assert case.mlp.num_tokens == [NUM_TOKENS]


def test_dropout_keys_are_what_they_were_afterwards() -> None:
    case = Case(DROPOUT)
    context = case.lora.dropout_context
    case.run(5)
    assert context.tokens is case.keys

    def fail(x: Tensor) -> Tensor:
        raise MemoryError

    case.mlp.forward = fail
    with pytest.raises(MemoryError):
        case.tiled(case.x)
    assert context.tokens is case.keys and not case.mlp.down.skip_output


def test_nothing_is_dropped_in_evaluation() -> None:
    case, without = Case(DROPOUT), Case(0.0)
    case.lora.dropout_context.tokens = None
    assert torch.equal(case.run(5)[0], without.run(5)[0])


def test_micro_batches_add_up() -> None:
    case = Case()
    once = case.run(5)[2]
    case.tiled(case.x.clone().requires_grad_()).backward(case.direction)
    assert_close(case.lora.gradient, 2 * once)


def test_tiles_of_a_reference_run_add_up_in_fp32() -> None:
    """Nothing is left in `.grad`, where 16-bit sums would lose bits."""
    case = Case(use_autograd=True)
    case.tiled.tile_tokens = 5
    case.tiled(case.x).backward(case.direction)
    assert all(p.grad is None for linear in case.linears for p in linear.lora.parameters())
    assert case.lora.gradient.count_nonzero() > 0.9 * case.lora.gradient.numel()


@pytest.mark.parametrize("skips", [False, True])
def test_only_the_input_is_kept_and_one_tile_is_alive(skips: bool) -> None:
    def peaks(tile_tokens: int | None) -> tuple[int, int, int]:
        """Bytes: kept after forward besides y, and the peaks of forward and backward."""
        case = Case()
        case.tiled.tile_tokens, case.tiled.skip_output = tile_tokens, skips
        x = case.x.clone().requires_grad_()
        with MemoryTracker(THE_CPU) as meter:
            y = case.tiled(x)
            kept, forward = meter.live_bytes - y.untyped_storage().nbytes(), meter.peak_bytes
            meter.reset_peak()
            y.backward(case.direction)
            return kept, forward, meter.peak_bytes

    inner_bytes = 4 * INNER * NUM_TOKENS
    kept, forward, backward = peaks(2)
    kept_at_once, forward_at_once, backward_at_once = peaks(None)
    assert kept == 0
    assert kept_at_once >= 3 * inner_bytes
    assert forward < inner_bytes < 3 * inner_bytes < forward_at_once
    # dx, factor gradients and what is alive of a tile.
    assert backward < backward_at_once / 2
