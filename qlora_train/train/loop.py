"""The training loop: batches in data order, optimizer steps, evaluations, checkpoints and resuming.

What step n computes depends on (recipe, n) and the state before it alone (step_bins.py), so a resumed run
gives the bytes of an uninterrupted one."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from pathlib import Path

import torch

from qlora_train.adapter.trained_on import FILE_NAME
from qlora_train.device.memory_tracker import MemoryTracker, peak_bytes
from qlora_train.device.step_clock import Cause
from qlora_train.errors import Interrupted, OutOfMemory, TrainingFailure
from qlora_train.micro_batch import MicroBatch
from qlora_train.plan.plan import largest_causes
from qlora_train.plan.time_model import step_time
from qlora_train.plan.words import gib
from qlora_train.report.write import refresh_report
from qlora_train.train.batches import BatchPrefetcher
from qlora_train.train.checkpoint import Expected, TrainState, is_finite, newest_valid, save_checkpoint
from qlora_train.train.pace import Pace
from qlora_train.train.plan_log import PlanLog
from qlora_train.train.progress import TrainProgress
from qlora_train.train.resumed import refuse_shorter, require_same_inputs
from qlora_train.train.run_folder import RunFolder
from qlora_train.train.schedule import learning_rate
from qlora_train.train.setup import Prepared
from qlora_train.train.signals import StopSignal
from qlora_train.train.step_bins import StepBins
from qlora_train.walk.evaluate import loss_sum
from qlora_train.walk.layer_walk import LayerWalk
from qlora_train.walk.optimizer import FlatOptimizer
from qlora_train.walk.step import StepRunner
from qlora_train.walk.step_state import INITIAL_SCALE
from qlora_train.weights.execution_plan import ExecutionPlan
from qlora_train.weights.uploads import Uploads

STEPS_METERED = 2
SAVE_SECONDS = 600.0  # between checkpoints with `save_every: auto`


class TrainLoop:
    """One run, from its first step or the next after a checkpoint to its last. See `run`."""

    def __init__(
        self,
        prepared: Prepared,
        folder: RunFolder,
        plan_log: PlanLog,
        meter: MemoryTracker,
        stop_metering: Callable[[], None],
        on_step: Callable[[Mapping[str, float | int | bool]], None] = lambda row: None,
    ) -> None:
        """plan_log: the log that the run's plans are in. meter: counts memory since before the base was
        loaded. stop_metering: called after the first steps, as metering costs time. on_step: called with each
        step's metrics."""
        self._recipe, self._folder, self._plan_log = prepared.recipe, folder, plan_log
        self._meter, self._stop_metering, self._on_step = meter, stop_metering, on_step
        self._log: Callable[[str], None] = print
        self._saved_at = self._step_began = time.monotonic()
        self._step_seconds: float | None = None
        self._is_evaluating = False
        self._prepared, self._accelerator = prepared, prepared.accelerator
        self._decoder, self._lora = prepared.model.decoder, prepared.model.lora
        self._device, self._clock = self._decoder.device, self._decoder.device.clock
        self._uploads = Uploads(self._device, prepared.model.host)
        training = self._recipe.training
        self._split = prepared.model.plan.workload.split
        self._bins = StepBins(
            training.num_bins(prepared.train_data.num_bins),
            training.bins_per_step(),
            self._split,
            self._accelerator.process_index,
            self._accelerator.num_processes,
        )
        self.num_steps = training.num_steps(prepared.train_data.num_bins)
        self._optimizer = FlatOptimizer(
            training.optimizer,
            self._lora,
            self._device,
            lora_b_lr_ratio=training.lora_b_lr_ratio,
            weight_decay=training.weight_decay,
        )
        self._state = TrainState(
            loss_scale=INITIAL_SCALE if self._decoder.dtype == torch.float16 else 1.0,
            data_fingerprint=prepared.train_data.fingerprint(),
            base_fingerprint=prepared.model.decoder.fingerprint,
        )
        self._runner = StepRunner(
            LayerWalk(
                self._decoder,
                self._lora,
                prepared.model.execution,
                reference=training.kernels == "reference",
                host=prepared.model.host,
            ),
            self._decoder,
            self._lora,
            self._optimizer,
            self._state,
            self._accelerator,
            max_grad_norm=training.max_grad_norm,
            seed=training.seed,
            on_tighter_plan=self._fall_back,
        )
        self._pace = Pace(self._device.description, prepared.model.host, STEPS_METERED)

    @property
    def step(self) -> int:
        """The last step that was trained."""
        return self._state.step

    @property
    def execution(self) -> ExecutionPlan:
        """The execution plan that steps follow now."""
        return self._runner.walk.execution

    def resume(self, log: Callable[[str], None] = print) -> int:
        """Load the newest valid checkpoint, if there is one; returns its step, or 0. log: called with a line
        for each damaged one."""
        refuse_shorter(self._folder, self.num_steps)
        expected = Expected(self.num_steps, self._lora.masters.numel(), self._optimizer.layout())
        checkpoint = newest_valid(self._folder.checkpoints, expected, log)
        if checkpoint is not None:
            require_same_inputs(self._folder, checkpoint.state, self._prepared)
            self._state = self._runner.state = checkpoint.state
            self._lora.masters.copy_(checkpoint.masters)
            self._lora.refresh_working()
            self._optimizer.load_state(checkpoint.optimizer_state)
        if self._accelerator.is_main_process:
            last_step = -1 if checkpoint is None else self._state.step  # -1: the first evaluation comes again
            self._folder.cut_rows(last_step)
        return self._state.step

    def run(self) -> None:
        """Train to the last step, then write the adapter. Raises `Interrupted` after a signal, with the state
        saved."""
        training, first = self._recipe.training, self._state.step
        stopping, samples = training.early_stopping, training.samples
        sampled_every = None if samples is None else samples.every
        steps = range(first + 1, first + 1 if self._state.stops_early(stopping) else self.num_steps + 1)
        with (
            StopSignal(self._stopping_line) as stop,
            self._progress(first) as progress,
            BatchPrefetcher(self._micro_batches, steps, self._device, self._uploads) as self._batches,
        ):
            self._log = progress.log
            if first == 0 and self._prepared.eval_data is not None:
                self._evaluate(0, progress)
            if first == 0:
                self._answer_samples(0)
            self._meter.reset_peak()
            for step in steps:
                row = self._one_step_or_save(step)
                self._compare_with_plan(step - first)
                self._report(row, progress)
                self._on_step(row)
                last, is_best = step == self.num_steps, False
                if self._prepared.eval_data is not None and (last or _due(step, training.eval_every)):
                    is_best = self._evaluate(step, progress)
                last |= self._state.stops_early(stopping)
                if last or _due(step, sampled_every):
                    self._answer_samples(step)
                signal_number = self._agreed(stop.received)
                if last or signal_number or self._save_is_due(step, is_best):
                    self._save(ends=last or signal_number > 0)
                if signal_number and not last:
                    if self._accelerator.is_main_process:
                        self._write_adapter(self._folder.adapter)
                    raise Interrupted(
                        signal_number,
                        f"stopped after step {step} of {self.num_steps}; the state is saved, go on "
                        "with --resume",
                    )
                if last:
                    break
            if self._state.step < self.num_steps:
                progress.log(self._state.early_end_line(self.num_steps))
        if self._accelerator.is_main_process:
            self._write_adapter(self._folder.adapter)
        self._accelerator.wait_for_everyone()  # other ranks return once rank 0 has written everything

    def _progress(self, first: int) -> TrainProgress:
        return TrainProgress(
            self.num_steps,
            first,
            self._recipe.training.log_every,
            slow_steps=STEPS_METERED,
            quiet=not self._accelerator.is_main_process,
            peak_name="peak" if self._device.is_accelerator else "process peak",
        )

    def _one_step_or_save(self, step: int) -> dict[str, float | int | bool]:
        """Run a step; if memory runs out for good, save the state before it and raise `OutOfMemory`."""
        try:
            return self._one_step(step)
        except OutOfMemory as error:
            saved = ""
            if self._state.step > 0:
                self._save(ends=True)
                saved = f" The state after step {self._state.step} is saved."
            plan = self._prepared.model.plan
            raise OutOfMemory(
                f"{error}. By the plan, the device held {largest_causes(plan)}. What would save memory: "
                f"{'; '.join(plan.advice) or 'nothing'}.{saved}"
            ) from error

    def _fall_back(self, step: int, execution: ExecutionPlan, change: str) -> None:
        """Record that a step is tried again by a plan with less memory."""
        self._plan_log.change(step, execution, change)
        self._log(f"step {step}: out of memory; tried again with less: {change}")

    def _compare_with_plan(self, num_steps_done: int) -> None:
        """After the first metered steps, log and store the predicted and the measured peak."""
        if num_steps_done != min(STEPS_METERED, self.num_steps):
            return
        predicted = self._prepared.model.plan.step_vram_bytes
        measured = self._meter.peak_bytes + self._optimizer.managed_bytes
        self._stop_metering()
        reserved = self._device.peak_reserved_bytes if self._device.is_accelerator else None
        self._plan_log.measured(measured, reserved)
        self._log(
            f"peak of a step: planned {gib(predicted)}, measured {gib(measured)} "
            f"({measured / predicted - 1:+.1%})"
            + ("" if reserved is None else f"; reserved by the allocator {gib(reserved)}")
        )

    def _watch_pace(self, seconds: float) -> None:
        """Log if steps take far longer than planned."""
        plan = self._prepared.model.plan
        planned_seconds = step_time(plan.workload, self.execution, plan.rates).total_seconds
        line = self._pace.slow_line(seconds, planned_seconds)
        if line is not None:
            self._log(line)

    def _one_step(self, step: int) -> dict[str, float | int | bool]:
        training, data = self._recipe.training, self._prepared.train_data
        started = self._step_began = time.monotonic()
        with self._clock.step():
            _, execution = self._plan_log.in_force(step)
            if execution != self.execution:
                self._runner.walk.set_execution(execution)
            positions = self._bins.positions(step)
            batches = self._batches.take(step)
            num_supervised = data.num_supervised([p for p in positions if p is not None])
            rate = learning_rate(
                step, self.num_steps, training.learning_rate, training.warmup_ratio, training.lr_schedule
            )
            outcome = self._runner.run(step, batches, max(1, num_supervised), rate)
        self._state.step = step
        seconds = self._step_seconds = time.monotonic() - started
        self._watch_pace(seconds)
        num_tokens = data.num_tokens(positions)
        row: dict[str, float | int | bool] = {
            "step": step,
            "loss": outcome.loss,
            "learning_rate": rate,
            "grad_norm": outcome.grad_norm,
            "num_tokens": num_tokens,
            "num_supervised_tokens": num_supervised,
            "tokens_per_second": num_tokens / seconds,
            "applied": outcome.applied,
        }
        if self._runner.scales_loss:
            row |= {"loss_scale": self._state.loss_scale, "overflowed": outcome.overflowed}
        row |= {"peak_bytes": peak_bytes(self._device), "plan": self._plan_log.in_force(step)[0]}
        return row | self._clock.read()

    def _micro_batches(self, step: int) -> list[MicroBatch]:
        """This rank's micro-batches of a step."""
        return [self._prepared.train_data.micro_batch(bins) for bins in self._bins.micro_batches(step)]

    def _report(self, row: dict[str, float | int | bool], progress: TrainProgress) -> None:
        step = int(row["step"])
        if self._accelerator.is_main_process:
            self._folder.append_metrics(row)
        if step % self._recipe.training.log_every == 0 or step == self.num_steps:
            self._accelerator.log({k: v for k, v in row.items() if k != "step"}, step=step)
        if row.get("overflowed"):
            progress.log(
                f"step {step}: fp16 overflow, not applied; loss scale is now {self._state.loss_scale:g}"
            )
        elif not row["applied"]:
            progress.log(f"step {step}: the gradient is not finite; the step is skipped")
        num_bins_done = min(step * self._bins.bins_per_step, self._bins.num_bins)
        epoch = num_bins_done / self._prepared.train_data.num_bins
        assert self._step_seconds is not None, "a step was taken"
        progress.step(row, epoch, self._step_seconds)

    def _evaluate(self, step: int, progress: TrainProgress) -> bool:
        """Compute and log the loss on the evaluation data; True if it is the best so far."""
        assert (data := self._prepared.eval_data) is not None
        mine = self._bins.of_this_rank(range(data.num_bins))
        group_size = self.execution.group_size(self._split.num_micro_batches)
        progress.show(f"evaluating on {data.num_bins:,} bins")
        self._is_evaluating = True
        with (
            self._clock.between_steps(Cause.EVALUATION),
            BatchPrefetcher(
                lambda i: [data.micro_batch(mine[i])], range(len(mine)), self._device, self._uploads
            ) as ahead,
        ):
            total = loss_sum(
                self._decoder, ahead.all(), group_size=group_size, loss_tokens=self.execution.loss_tokens
            )
        eval_loss = float(self._accelerator.reduce(total)) / data.num_supervised(range(data.num_bins))
        self._is_evaluating = False
        if self._accelerator.is_main_process:
            self._folder.append_metrics({"step": step, "eval_loss": eval_loss})
        self._accelerator.log({"eval_loss": eval_loss}, step=step)
        progress.log(f"step {step}: eval loss {eval_loss:.4f}")
        return self._state.count_evaluation(eval_loss, self._recipe.training.early_stopping)

    def _answer_samples(self, step: int) -> None:
        """Answer the prompts of training.samples, if there are any; every rank does, so that none waits."""
        if (samples := self._prepared.samples) is None:
            return
        with self._clock.between_steps(Cause.SAMPLES):
            rows = samples.rows(self._decoder, step)
        if self._accelerator.is_main_process:
            self._folder.append_samples(rows)
        self._log(f"step {step}: the prompts of training.samples are answered in samples.jsonl")

    def _save(self, *, ends: bool) -> None:
        """Write a checkpoint and the run's page. ends: no step follows, so the time since the last one gets a
        row of its own."""
        self._require_finite()
        self._saved_at = time.monotonic()
        if not self._accelerator.is_main_process:
            return
        with self._clock.between_steps(Cause.CHECKPOINT):
            save_checkpoint(
                self._folder.checkpoints,
                self._state,
                self._lora.masters,
                self._optimizer.state(),
                self._recipe.training.keep_checkpoints,
                self._write_adapter,
            )
        if ends:
            self._folder.append_metrics({"step": self._state.step, **self._clock.read_all()})
        with self._clock.between_steps(Cause.CHECKPOINT):
            if problem := refresh_report(self._folder.path):
                self._log(problem)

    def _write_adapter(self, folder: Path) -> None:
        trained, step = self._prepared.model.adapter, self._state.step
        trained_on = {FILE_NAME: self._prepared.trained_on.to_json(step, self.num_steps)}
        trained.save(folder, self._lora.views(self._lora.masters), trained_on)

    def _save_is_due(self, step: int, is_best: bool) -> bool:
        """Whether to save after this step. Rank 0 alone writes, so ranks need not agree on the time."""
        every = self._recipe.training.save_every
        if every is None or is_best:
            return is_best and every is not None
        return time.monotonic() - self._saved_at >= SAVE_SECONDS if every == "auto" else step % every == 0

    def _stopping_line(self) -> str:
        """The line that a signal's handler prints in the middle of a step or an evaluation."""
        step, left = self._state.step + 1, ""
        if self._step_seconds is not None:
            seconds_left = max(0.0, self._step_began + self._step_seconds - time.monotonic())
            left = f", about {seconds_left:.0f} s"
        work = f"step {step} is being finished{left}"
        if self._is_evaluating:  # the first one before step 1, which leaves something to save
            work = f"the evaluation {'is' if step > 1 else 'and step 1 are'} being finished"
        return f"stopping: {work}, then the state is saved; again to stop at once"

    def _require_finite(self) -> None:
        """Raise `TrainingFailure` if masters or optimizer state are not finite, instead of saving them. A
        gradient that is not finite is found in its own step, but an update that is too large only in the
        next one."""
        if all(map(is_finite, (self._lora.masters, *self._optimizer.state().values()))):
            return
        raise TrainingFailure(
            f"the LoRA parameters are not finite after step {self._state.step}: an update was too large. "
            "Lower training.learning_rate or training.weight_decay. Nothing of this step is saved."
        )

    def _agreed(self, signal_number: int) -> int:
        """The highest signal number of all ranks, so that they stop at the same step; 0: none."""
        if self._accelerator.num_processes == 1:
            return signal_number
        highest = torch.tensor(signal_number, device=self._device.torch)
        torch.distributed.all_reduce(highest, op=torch.distributed.ReduceOp.MAX)
        return int(highest)


def _due(step: int, every: int | None) -> bool:
    return every is not None and step % every == 0
