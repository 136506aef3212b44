"""One optimizer step: walk, unscale, sum over ranks, check, clip, update; one host read.

    walk                         if out of memory: the same step again by a tighter plan
    g <- g / loss_scale          exact: the scale is a power of two
    g <- sum over ranks of g     already divided by the supervised tokens of all ranks
    [loss, ||g||]                the only values the host waits for
    g <- g min(1, max_norm / ||g||)

A non-finite norm means the step is not applied. In fp16 with a scale above 1 that is an overflow: the scale
is halved. Otherwise it is a bad step: skipped and counted; three in a row stop the run.
"""

from __future__ import annotations

import gc
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from accelerate import Accelerator
from torch import Tensor

from qlora_train.device.step_clock import Cause
from qlora_train.errors import OutOfMemory, TrainingFailure
from qlora_train.model.decoder import FrozenDecoder
from qlora_train.model.lora_parameters import LoraParameters
from qlora_train.model.packed_tokens import PackedTokens
from qlora_train.walk.layer_walk import LayerWalk
from qlora_train.walk.oom_fallback import fallback_plan, is_out_of_memory
from qlora_train.walk.optimizer import FlatOptimizer
from qlora_train.walk.overflow import first_overflow
from qlora_train.walk.step_state import StepState
from qlora_train.weights.execution_plan import ExecutionPlan

MAX_SKIPPED_IN_A_ROW = 3


@dataclass(frozen=True)
class StepOutcome:
    """The result of one step. loss: mean over its supervised tokens. grad_norm: before clipping. applied:
    False if it was skipped. overflowed: skipped because of the fp16 loss scale."""

    loss: float
    grad_norm: float
    applied: bool
    overflowed: bool


class StepRunner:
    """Runs optimizer steps. state: what they leave to the next; it may be replaced between steps.
    scales_loss: the loss scale is dynamic, as the compute dtype is fp16."""

    def __init__(
        self,
        walk: LayerWalk,
        decoder: FrozenDecoder,
        lora: LoraParameters,
        optimizer: FlatOptimizer,
        state: StepState,
        accelerator: Accelerator,
        *,
        max_grad_norm: float,
        seed: int,
        on_tighter_plan: Callable[[int, ExecutionPlan, str], None] = lambda step, execution, reason: None,
    ) -> None:
        """on_tighter_plan: called with (step, execution plan, reason) before a step is tried again by it."""
        self.walk, self._decoder, self._lora, self._optimizer = walk, decoder, lora, optimizer
        self.state, self._accelerator = state, accelerator
        self.scales_loss = decoder.dtype == torch.float16
        self._max_grad_norm, self._seed = max_grad_norm, seed
        self._on_tighter_plan = on_tighter_plan

    def run(
        self, step: int, micro_batches: Sequence[PackedTokens], num_supervised: int, learning_rate: float
    ) -> StepOutcome:
        """Run one step. num_supervised: supervised tokens of all ranks. Raises `TrainingFailure` at the third
        bad step in a row, `OutOfMemory` if memory runs out and no tighter plan is left; the masters are then
        unchanged."""
        gradient, clock = self._lora.gradient, self._decoder.device.clock
        loss_sum = self._walk_within_memory(step, micro_batches, num_supervised)
        if self.state.loss_scale != 1.0:
            gradient.mul_(1.0 / self.state.loss_scale)
        if self._accelerator.num_processes > 1:
            torch.distributed.all_reduce(gradient)
            torch.distributed.all_reduce(loss_sum)
        norm = torch.linalg.vector_norm(gradient)
        values = torch.stack([loss_sum / num_supervised, norm])
        with clock.spent_on(Cause.OPTIMIZER):
            loss_value, norm_value = values.tolist()  # the one host read
            clock.host_has_waited()
            if not math.isfinite(norm_value):
                return self._skip(loss_value, norm_value, micro_batches)
            if norm_value > self._max_grad_norm:
                gradient.mul_(self._max_grad_norm / norm_value)
            self._optimizer.step(learning_rate)
        self.state.record_applied(scales_loss=self.scales_loss)
        return StepOutcome(loss_value, norm_value, applied=True, overflowed=False)

    def _walk_within_memory(
        self, step: int, micro_batches: Sequence[PackedTokens], num_supervised: int
    ) -> Tensor:
        """Walk, and again by tighter plans until every rank has enough memory; returns the loss sum. The
        gradient is that of the last attempt alone."""
        while True:
            self._lora.gradient.zero_()
            loss_sum, failure = self._try_walk(step, micro_batches, num_supervised)
            if not self._any_rank(failure is not None):
                assert loss_sum is not None
                return loss_sum
            del loss_sum
            self._free_memory()
            tokens = max(batch.labels.numel() for batch in micro_batches)
            tighter = fallback_plan(self.walk.execution, len(micro_batches), tokens)
            if tighter is None:
                raise OutOfMemory(f"out of memory in step {step}, and no tighter plan is left ({failure})")
            execution, change = tighter
            self._on_tighter_plan(step, execution, change)
            self.walk.set_execution(execution)

    def _try_walk(
        self, step: int, micro_batches: Sequence[PackedTokens], num_supervised: int
    ) -> tuple[Tensor | None, str | None]:
        """(loss sum, None), or (None, the out-of-memory message). The exception is not passed on: its
        traceback references the tensors of the failed walk."""
        try:
            loss_sum = self.walk.accumulate(
                micro_batches,
                seed=self._seed,
                step=step,
                num_supervised=num_supervised,
                loss_scale=self.state.loss_scale,
            )
        except (RuntimeError, MemoryError) as error:
            if not is_out_of_memory(error):
                raise
            self.walk.abort()
            return None, str(error).strip().partition("\n")[0] or type(error).__name__
        return loss_sum, None

    def _any_rank(self, flag: bool) -> bool:
        if self._accelerator.num_processes == 1:
            return flag
        anywhere = torch.tensor(int(flag), device=self._lora.gradient.device)
        torch.distributed.all_reduce(anywhere, op=torch.distributed.ReduceOp.MAX)
        return bool(anywhere)

    def _free_memory(self) -> None:
        gc.collect()
        self._decoder.device.release_cached()

    def _skip(self, loss: float, norm: float, micro_batches: Sequence[PackedTokens]) -> StepOutcome:
        if self.state.absorbs_overflow():
            return StepOutcome(loss, norm, applied=False, overflowed=True)
        if self.state.skipped_in_a_row >= MAX_SKIPPED_IN_A_ROW:
            raise TrainingFailure(
                f"non-finite gradients in {MAX_SKIPPED_IN_A_ROW} steps in a row: "
                f"{self._first_bad_layer(micro_batches)}. "
                "Lower training.learning_rate or training.weight_decay, or use model.compute_dtype bfloat16 "
                "or float32."
            )
        return StepOutcome(loss, norm, applied=False, overflowed=False)

    @torch.no_grad()
    def _first_bad_layer(self, micro_batches: Sequence[PackedTokens]) -> str:
        """A message naming the first value that is not finite: LoRA parameters, then layer outputs, then
        gradients from the last layer back."""
        if not torch.isfinite(self._lora.masters).all():
            return "the LoRA parameters themselves are not finite: an update was too large"
        for tokens in micro_batches:
            layer, _ = first_overflow(self._decoder, tokens)
            if layer is not None:
                return f"the output of decoder layer {layer} is the first that is not finite"
        pairs = self._lora.views(self._lora.gradient)
        for name in (*reversed(self._lora.names), *self._lora.token_rows(self._lora.gradient)):
            if not all(torch.isfinite(part).all() for part in pairs[name]):
                return f"all outputs are finite; going back, the gradient of {name} is the first that is not"
        return "the outputs of all layers and their gradients are finite one by one; their norm is not"
