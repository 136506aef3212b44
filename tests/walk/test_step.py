"""One optimizer step: clipping, non-finite gradients, and how often the host waits for the device."""

from __future__ import annotations

import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from tiny_models import load_tiny, packed_row, resident_plan, write_checkpoint
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from qlora_train.device.compute import THE_CPU
from qlora_train.errors import TrainingFailure
from qlora_train.model.decoder import FrozenDecoder
from qlora_train.model.lora_parameters import LoraParameters
from qlora_train.quant.formats import Quantization
from qlora_train.walk.layer_walk import LayerWalk
from qlora_train.walk.optimizer import FlatOptimizer
from qlora_train.walk.step import StepOutcome, StepRunner
from qlora_train.walk.step_state import StepState
from qlora_train.weights.execution_plan import ActivationPolicy

BATCHES = [packed_row([14, 18], seed=1), packed_row([32], seed=2, first_row=1)]
NUM_SUPERVISED = sum(len(batch.supervised) for batch in BATCHES)
UNQUANTIZED = Quantization("none")
MIXED = (ActivationPolicy.RECOMPUTE, ActivationPolicy.KEEP, ActivationPolicy.RECOMPUTE)


class Rig:
    """A step runner and all its parts."""

    def __init__(
        self,
        folder: Path,
        *,
        dtype: torch.dtype = torch.float32,
        loss_scale: float = 1.0,
        max_grad_norm: float = 1e9,
        optimizer: str = "adamw",
        reference: bool = False,
        quantization: Quantization = UNQUANTIZED,
        dropout: float = 0.0,
    ) -> None:
        self.decoder: FrozenDecoder
        self.lora: LoraParameters
        self.decoder, self.lora = load_tiny(folder, quantization, dtype, dropout=dropout)
        self.walk = LayerWalk(self.decoder, self.lora, resident_plan(*MIXED), reference=reference)
        self.state = StepState(loss_scale)
        self.optimizer = FlatOptimizer(optimizer, self.lora, THE_CPU, lora_b_lr_ratio=1.0, weight_decay=0.0)
        self.runner = StepRunner(
            self.walk,
            self.decoder,
            self.lora,
            self.optimizer,
            self.state,
            SimpleNamespace(num_processes=1),  # type: ignore[arg-type]
            max_grad_norm=max_grad_norm,
            seed=0,
        )

    def run(self, step: int = 1, learning_rate: float = 1e-3) -> StepOutcome:
        return self.runner.run(step, BATCHES, NUM_SUPERVISED, learning_rate)

    def walked_gradient(self, step: int = 1) -> Tensor:
        """What the walk alone gives, unscaled."""
        self.lora.gradient.zero_()
        self.walk.accumulate(BATCHES, seed=0, step=step, num_supervised=NUM_SUPERVISED)
        return self.lora.gradient.clone()


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_checkpoint(tmp_path_factory.mktemp("step"))


def test_loss_norm_and_update_of_a_plain_step(folder: Path) -> None:
    rig = Rig(folder)
    gradient, before = rig.walked_gradient(), rig.lora.masters.clone()
    outcome = rig.run()
    assert (outcome.applied, outcome.overflowed) == (True, False)
    assert outcome.grad_norm == torch.linalg.vector_norm(gradient).item() > 0
    assert torch.equal(rig.lora.gradient, gradient)
    # AdamW's first step moves every element by the rate times g / (|g| + epsilon)
    expected = before - 1e-3 * gradient / (gradient.abs() + 1e-8)
    torch.testing.assert_close(rig.lora.masters, expected, rtol=0, atol=1e-7)


@pytest.mark.parametrize("share", [0.25, 0.9, 1.0, 3.0])
def test_clipping_is_exact(folder: Path, share: float) -> None:
    rig = Rig(folder)
    gradient = rig.walked_gradient()
    norm = torch.linalg.vector_norm(gradient).item()
    rig = Rig(folder, max_grad_norm=share * norm)
    outcome = rig.run()
    assert outcome.grad_norm == norm  # before clipping
    expected = gradient * min(1.0, (share * norm) / norm)
    assert torch.equal(rig.lora.gradient, expected)
    assert torch.linalg.vector_norm(rig.lora.gradient).item() == pytest.approx(
        min(share, 1.0) * norm, rel=1e-6
    )


def test_the_loss_scale_leaves_no_trace(folder: Path) -> None:
    plain = Rig(folder).walked_gradient()
    rig = Rig(folder, loss_scale=1024.0)
    rig.run()
    assert torch.equal(rig.lora.gradient, plain)  # fp32 and a power of two: the same bits
    assert rig.state == StepState(1024.0), "only in fp16 the scale is dynamic"


def test_an_fp16_overflow_halves_the_scale_and_is_not_applied(folder: Path) -> None:
    rig = Rig(folder, dtype=torch.float16, loss_scale=2.0**24)
    before = rig.lora.masters.clone()
    outcomes = []
    while not outcomes or not outcomes[-1].applied:
        outcomes.append(rig.run())
        if not outcomes[-1].applied:
            assert torch.equal(rig.lora.masters, before)
            assert rig.optimizer.state() == {}
    num_overflows = len(outcomes) - 1
    assert num_overflows >= 4, "more in a row than a real failure may have"
    assert all(outcome.overflowed and not math.isfinite(outcome.grad_norm) for outcome in outcomes[:-1])
    assert all(math.isfinite(outcome.loss) for outcome in outcomes)
    assert rig.state.loss_scale == 2.0 ** (24 - num_overflows) and rig.state.num_overflows == num_overflows
    assert rig.state.num_skipped == 0 and not outcomes[-1].overflowed
    assert rig.state.loss_scale_good_steps == 1
    assert not torch.equal(rig.lora.masters, before)


def spoil_layer_1(decoder: FrozenDecoder) -> Tensor:
    weight = decoder.layers[1].input_layernorm.weight
    weight.data[3] = math.inf
    return weight


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_three_bad_steps_in_a_row_stop_the_run_and_name_the_layer(folder: Path, dtype: torch.dtype) -> None:
    rig = Rig(folder, dtype=dtype)
    before = rig.lora.masters.clone()
    spoil_layer_1(rig.decoder)
    for step in (1, 2):
        outcome = rig.run(step)
        assert (outcome.applied, outcome.overflowed) == (False, False)
        assert rig.state.num_skipped == rig.state.skipped_in_a_row == step
    with pytest.raises(TrainingFailure, match="3 steps in a row: the output of decoder layer 1 is the first"):
        rig.run(3)
    assert torch.equal(rig.lora.masters, before)


def test_a_good_step_breaks_the_row(folder: Path) -> None:
    rig = Rig(folder)
    weight = rig.decoder.layers[1].input_layernorm.weight
    good = weight.data.clone()
    for step in range(1, 7):
        weight.data.copy_(good)
        if step % 3:
            spoil_layer_1(rig.decoder)
        assert rig.run(step).applied == (step % 3 == 0)
    assert (rig.state.num_skipped, rig.state.skipped_in_a_row) == (4, 0)


def test_fp16_at_scale_1_is_a_bad_step_and_no_overflow(folder: Path) -> None:
    rig = Rig(folder, dtype=torch.float16, loss_scale=2.0)
    spoil_layer_1(rig.decoder)
    assert rig.run(1).overflowed
    assert not rig.run(2).overflowed and rig.state.loss_scale == 1.0
    assert (rig.state.num_skipped, rig.state.num_overflows) == (1, 1)


def test_a_gradient_that_goes_bad_on_the_way_back_is_named(folder: Path) -> None:
    rig = Rig(folder)
    rig.lora.gradient.fill_(1.0)
    for name in ("model.layers.0.mlp.up_proj", "model.layers.1.self_attn.k_proj"):
        rig.lora.views(rig.lora.gradient)[name][0][0, 0] = math.nan
    message = rig.runner._first_bad_layer(BATCHES)
    assert message.endswith("the gradient of model.layers.1.self_attn.k_proj is the first that is not")


class DeviceReads(TorchDispatchMode):
    """Counts the operations that make the host wait for values on the device: `.item()` and what ends in it,
    and those whose output's size is a value. Dispatch modes are on in backward too."""

    WAITS = frozenset(["_local_scalar_dense", "nonzero", "masked_select", "_unique2", "equal", "is_nonzero"])

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.overloadpacket.__name__
        if name in self.WAITS:
            self.calls.append(name)
        return func(*args, **(kwargs or {}))


@pytest.fixture
def method_reads(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The calls of tensor methods that need values on the host; on the CPU some pass by every dispatcher."""
    calls: list[str] = []

    def counted(name: str) -> Any:
        original = getattr(torch.Tensor, name)

        def method(*args: Any, **kwargs: Any) -> Any:
            calls.append(name)
            return original(*args, **kwargs)

        return method

    for name in (
        "item",
        "tolist",
        "cpu",
        "numpy",
        "__bool__",
        "__float__",
        "__int__",
        "__index__",
        "__array__",
    ):
        monkeypatch.setattr(torch.Tensor, name, counted(name))
    return calls


class _ReadsInBackward(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.clone()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        return gradient * sum(gradient.tolist()) * float(gradient.sum())


def test_the_counters_see_reads_even_in_backward(method_reads: list[str]) -> None:
    x = torch.ones(3, requires_grad=True)
    with DeviceReads() as reads:
        _ReadsInBackward.apply(x).sum().backward()
        bool(x.detach().nonzero().sum() > 0)
    assert method_reads == ["tolist", "__float__", "__bool__"]
    assert reads.calls == ["_local_scalar_dense", "nonzero", "_local_scalar_dense"]


@pytest.mark.parametrize("reference", [True, False])
@pytest.mark.parametrize(
    "quantization",
    [Quantization("nf4", True), Quantization("int8"), Quantization("none")],
    ids=lambda p: p.format,
)
def test_the_walk_reads_nothing_on_the_host(
    folder: Path, method_reads: list[str], quantization: Quantization, reference: bool
) -> None:
    rig = Rig(folder, quantization=quantization, reference=reference, dropout=0.1)
    method_reads.clear()
    with DeviceReads() as reads:
        rig.walk.accumulate(BATCHES, seed=0, step=1, num_supervised=NUM_SUPERVISED)
    assert method_reads == [] and reads.calls == []


@pytest.mark.parametrize("optimizer", ["adamw", "paged_adamw_8bit"])
def test_a_step_reads_once_on_the_host(folder: Path, method_reads: list[str], optimizer: str) -> None:
    rig = Rig(
        folder, quantization=Quantization("nf4", True), dropout=0.1, max_grad_norm=0.01, optimizer=optimizer
    )
    rig.run(1)
    method_reads.clear()
    with DeviceReads() as reads:
        assert rig.run(2).applied
    # torch's AdamW keeps its count of steps in a tensor on the host, and reads that
    count_of_steps = 1 if optimizer == "adamw" else 0
    assert method_reads == ["tolist"] + ["item"] * count_of_steps
    assert len(reads.calls) == count_of_steps
