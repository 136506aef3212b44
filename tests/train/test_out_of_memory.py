"""Memory runs out in mid-step: the same step again by a tighter plan, nothing of the first try."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from tiny_models import load_tiny, packed_row, resident_plan, write_checkpoint
from torch import Tensor

from qlora_train.device.compute import THE_CPU
from qlora_train.errors import OutOfMemory
from qlora_train.model.decoder import FrozenDecoder
from qlora_train.walk.layer_walk import LayerWalk
from qlora_train.walk.oom_fallback import fallback_plan, is_out_of_memory
from qlora_train.walk.optimizer import FlatOptimizer
from qlora_train.walk.step import StepRunner
from qlora_train.walk.step_state import StepState
from qlora_train.weights.execution_plan import ActivationPolicy, ExecutionPlan, Placement

KEEP, RECOMPUTE, OFFLOAD = ActivationPolicy.KEEP, ActivationPolicy.RECOMPUTE, ActivationPolicy.OFFLOAD
BATCHES = [packed_row([14, 18], seed=k, first_row=k) for k in range(4)]
NUM_SUPERVISED = sum(len(batch.supervised) for batch in BATCHES)
ERRORS = {
    "cuda": lambda: torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20 MiB"),
    "cpu": lambda: RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory"),
    "python": MemoryError,
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_checkpoint(tmp_path_factory.mktemp("base"))


def runner(
    folder: Path, plan: ExecutionPlan, told: list[tuple[int, str]], reference: bool = False
) -> tuple[StepRunner, FrozenDecoder]:
    decoder, lora = load_tiny(folder, plan=plan, dropout=0.1)
    optimizer = FlatOptimizer("adamw", lora, THE_CPU, lora_b_lr_ratio=1.0, weight_decay=0.0)
    return StepRunner(
        LayerWalk(decoder, lora, plan, reference=reference),
        decoder,
        lora,
        optimizer,
        StepState(),
        SimpleNamespace(num_processes=1),  # type: ignore[arg-type]
        max_grad_norm=1e9,
        seed=0,
        on_tighter_plan=lambda step, plan, change: told.append((step, change)),
    ), decoder


def run_out(monkeypatch: pytest.MonkeyPatch, at_calls: set[int], error: Callable[[], Exception]) -> list[int]:
    """Let the n-th calls of a layer run out of memory."""
    calls: list[int] = []
    run_layer = FrozenDecoder.run_layer

    def run(self: FrozenDecoder, index: int, *args: object) -> Tensor:
        calls.append(index)
        if len(calls) in at_calls:
            raise error()
        return run_layer(self, index, *args)  # type: ignore[arg-type]

    monkeypatch.setattr(FrozenDecoder, "run_layer", run)
    return calls


@pytest.mark.parametrize("reference", [False, True], ids=["auto", "reference"])
@pytest.mark.parametrize("kind", ERRORS)
@pytest.mark.parametrize("place", [Placement.DEVICE, Placement.DISK])
@pytest.mark.parametrize("call", [1, 9, 13, 15])  # first layer, in the middle forward, in backward
def test_the_redone_step_is_the_step(
    folder: Path, monkeypatch: pytest.MonkeyPatch, place: Placement, kind: str, call: int, reference: bool
) -> None:
    slots = 0 if place is Placement.DEVICE else 2
    plan = resident_plan(RECOMPUTE, KEEP, OFFLOAD, weights=(place,) * 3, num_slots=slots)
    told: list[tuple[int, str]] = []
    plain, _ = runner(folder, plan, told, reference)
    expected = plain.run(4, BATCHES, NUM_SUPERVISED, 1e-3)
    assert told == []

    tried, decoder = runner(folder, plan, told, reference)
    run_out(monkeypatch, {call}, ERRORS[kind])
    outcome = tried.run(4, BATCHES, NUM_SUPERVISED, 1e-3)
    assert told == [(4, "1 more layers are recomputed")]
    assert outcome == expected
    assert torch.equal(tried._lora.gradient, plain._lora.gradient)
    assert torch.equal(tried._lora.masters, plain._lora.masters)
    assert tried.walk.execution.activations == (RECOMPUTE, RECOMPUTE, OFFLOAD)


@pytest.mark.parametrize(
    "error",
    [
        *(make() for make in ERRORS.values()),
        torch.AcceleratorError("CUDA error: out of memory\nCUDA kernel errors might be asynchronously"),
        RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
        RuntimeError("CUDA driver error: out of memory"),
        RuntimeError("Triton Error [CUDA]: out of memory"),
    ],
    ids=repr,
)
def test_memory_that_runs_out_is_told_from_other_errors(error: Exception) -> None:
    assert is_out_of_memory(error)
    assert isinstance(error, RuntimeError | MemoryError)  # what a step catches
    assert not is_out_of_memory(type(error)("CUDA error: an illegal memory access")) or isinstance(
        error, MemoryError | torch.OutOfMemoryError
    )


def test_other_errors_are_not_swallowed(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tried, _ = runner(folder, resident_plan(KEEP, KEEP, KEEP), [])
    run_out(monkeypatch, {2}, lambda: RuntimeError("shapes differ"))
    with pytest.raises(RuntimeError, match="shapes differ"):
        tried.run(1, BATCHES, NUM_SUPERVISED, 1e-3)


def test_when_nothing_helps_the_masters_are_those_of_before(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    told: list[tuple[int, str]] = []
    tried, _ = runner(folder, resident_plan(KEEP, KEEP, KEEP, loss_tokens=512), told)
    before = tried._lora.masters.clone()
    run_out(monkeypatch, set(range(1, 10_000)), ERRORS["cuda"])
    with pytest.raises(OutOfMemory, match=r"in step 7, and no tighter plan is left \(CUDA out of memory"):
        tried.run(7, BATCHES, NUM_SUPERVISED, 1e-3)
    assert torch.equal(tried._lora.masters, before)
    assert [change for _, change in told] == [
        "2 more layers are recomputed",
        "1 more layers are recomputed",
        "layer inputs wait in RAM",
        "the loss takes 256 tokens at a time",
        "the loss takes 128 tokens at a time",
        "the loss takes 64 tokens at a time",
        "micro-batches pass in 2 groups",
        "micro-batches pass in 4 groups",
    ]


def test_long_rows_are_cut_into_mlp_tiles_last() -> None:
    plan = resident_plan(RECOMPUTE, inputs=Placement.RAM, loss_tokens=64)
    changes = []
    while (found := fallback_plan(plan, num_micro_batches=1, num_tokens=3000)) is not None:
        plan, change = found
        changes.append(change)
    assert changes == [f"the MLP takes {n} tokens at a time" for n in (2048, 1024, 512, 256)]


def test_a_plan_with_nothing_kept_alive_frees_the_failed_walk(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The exception's traceback must not hold the tensors of the first try while the second runs."""
    from qlora_train.device.memory_tracker import MemoryTracker

    plan = resident_plan(KEEP, KEEP, KEEP)
    with MemoryTracker(THE_CPU) as meter:
        tried, _ = runner(folder, plan, [])
        tried.run(1, BATCHES, NUM_SUPERVISED, 1e-3)
        usual = meter.peak_bytes
        meter.reset_peak()
        run_out(monkeypatch, {12}, ERRORS["cuda"])
        tried.run(2, BATCHES, NUM_SUPERVISED, 1e-3)
        assert meter.peak_bytes <= usual
