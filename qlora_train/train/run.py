"""Runs `train`, from a recipe to an adapter. All input is read before anything is written."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack, nullcontext
from dataclasses import asdict
from pathlib import Path

from accelerate import Accelerator
from rich.console import Console

from qlora_train.data.building import OpenData, open_data
from qlora_train.device.memory_tracker import MemoryTracker
from qlora_train.device.settings import determinism_of_before, require_deterministic_products
from qlora_train.doctor.command import machine_lines
from qlora_train.kernels.on_device import find_device
from qlora_train.model.packed_tokens import PackedTokens
from qlora_train.plan.machine_plan import device_of_all
from qlora_train.recipe import Recipe
from qlora_train.terminal_text import message
from qlora_train.train import OnStep, TrainResult
from qlora_train.train.agreement import facts_of, require_agreement
from qlora_train.train.introduction import introduction, planned_seconds
from qlora_train.train.loop import TrainLoop
from qlora_train.train.plan_log import PlanLog, SavedPlan, Setting
from qlora_train.train.resumed import lengthened_line
from qlora_train.train.run_folder import RunFolder
from qlora_train.train.setup import Prepared, RunContext, make_accelerator, prepare, resolve
from qlora_train.walk.overflow import require_range
from qlora_train.weights.ranks import find_ranks


def run_training(recipe: Recipe, on_step: OnStep, *, resume: bool, use_cache: bool) -> TrainResult:
    """See `train`."""
    folder = RunFolder(Path(recipe.training.output_dir))
    with determinism_of_before():
        accelerator = make_accelerator(recipe)
        console = Console(quiet=not accelerator.is_main_process, highlight=False)

        def log(line: str) -> None:
            console.print(message(line), markup=False, soft_wrap=True)

        with folder.claimed(log) if accelerator.is_main_process else nullcontext():
            return _train(recipe, folder, accelerator, on_step, log, resume=resume, use_cache=use_cache)


def _train(
    recipe: Recipe,
    folder: RunFolder,
    accelerator: Accelerator,
    on_step: OnStep,
    log: Callable[[str], None],
    *,
    resume: bool,
    use_cache: bool,
) -> TrainResult:
    """`run_training`, with the run folder locked."""
    run, data = _read_input(recipe, folder, accelerator, log, resume=resume)
    plan_log = _plan_log_of(run, folder, writes=accelerator.is_main_process)
    with ExitStack() as limits, ExitStack() as metering:
        limits.callback(run.device.limit_allocator, None)  # the process (a notebook) may go on
        meter = metering.enter_context(MemoryTracker(run.device))
        saved = plan_log.read() if resume else None
        prepared = prepare(run, data, accelerator, saved, use_cache=use_cache)
        loop = TrainLoop(prepared, folder, plan_log, meter, metering.close, on_step)
        first = loop.resume(log) if resume else 0
        lines = _announce(prepared, folder, loop.num_steps, first, log, resume=resume)
        require_agreement(run.ranks, lambda: facts_of(prepared, first))  # no rank still checks the folder
        if accelerator.is_main_process:
            folder.begin(prepared.recipe)
        if plan_log.moved:
            log(f"planned anew from step {first + 1} on ({', '.join(plan_log.moved)})")
        _begin_plan_log(plan_log, prepared, loop.num_steps, first + 1, lines)
        accelerator.init_trackers("qlora_train", config=_flat(prepared.recipe))
        try:
            loop.run()
        finally:
            prepared.model.decoder.close()
            accelerator.end_training()
    loss, eval_loss = _last_losses(folder)
    log(f"done: adapter in {folder.adapter}")
    return TrainResult(folder.path, folder.adapter, loop.step, loss, eval_loss)


def _read_input(
    recipe: Recipe, folder: RunFolder, accelerator: Accelerator, log: Callable[[str], None], *, resume: bool
) -> tuple[RunContext, OpenData]:
    """Find the devices, resolve the recipe, open its data and check that the run folder is for it."""
    ranks = find_ranks(accelerator.device)
    device = find_device(accelerator.device)
    for line in machine_lines(device, folder.path):
        log(line)
    require_deterministic_products(device.torch)
    target = device_of_all(device, ranks)
    recipe, base, dtype = resolve(recipe, target, ranks.number)
    data = open_data(recipe.data)
    recipe = recipe.model_copy(update={"data": data.section_with_format})
    folder.check(recipe, resume=resume)
    return RunContext(recipe, base, dtype, device, ranks, target, log), data


def _plan_log_of(run: RunContext, folder: RunFolder, *, writes: bool) -> PlanLog:
    """The run's plan log, with the setting of the first rank."""
    settings = run.ranks.gather(asdict(Setting.of(run.recipe, run.target, run.ranks.number)))
    return PlanLog(folder.plan_file, folder.checkpoints, Setting(**settings[0]), writes=writes)


def _announce(
    prepared: Prepared,
    folder: RunFolder,
    num_steps: int,
    first: int,
    log: Callable[[str], None],
    *,
    resume: bool,
) -> list[str]:
    """Log what is about to be trained; returns the introduction. Raises `UnsupportedModelError` where the
    activations leave the range of fp16."""
    near_end_of_range = require_range(prepared.model.decoder, _first_micro_batch(prepared))
    lines = introduction(prepared, num_steps, first, resume=resume)
    for line in lines:
        log(line)
    if near_end_of_range is not None:
        log(near_end_of_range)
    begun = folder.begun_recipe() if first else None
    if begun is not None and (lengthened := lengthened_line(begun, prepared, num_steps, first + 1)):
        log(lengthened)
    return lines


def _begin_plan_log(
    plan_log: PlanLog, prepared: Prepared, num_steps: int, first_step: int, lines: list[str]
) -> None:
    """Store the plan, what it predicts for the whole run, and the introduction's lines."""
    plan = prepared.model.plan
    values = plan.to_dict() | {
        "seconds_to_the_end": planned_seconds(prepared, num_steps),
        "introduction": lines,
    }
    plan_log.begin(values, SavedPlan(prepared.model.execution, plan.workload.split), first_step)


def _first_micro_batch(prepared: Prepared) -> PackedTokens:
    """The first micro-batch of the data, on every rank the same."""
    batch = prepared.train_data.micro_batch(range(prepared.model.plan.workload.micro_batch_size))
    return PackedTokens.from_host(batch, prepared.model.decoder.device.torch)


def _flat(recipe: Recipe) -> dict[str, str]:
    """The recipe as `section.key` -> text, as trackers take it."""
    return {
        f"{section}.{key}": str(v)
        for section, values in recipe.model_dump().items()
        for key, v in values.items()
    }


def _last_losses(folder: RunFolder) -> tuple[float | None, float | None]:
    """(training loss, evaluation loss), the last of each in metrics.jsonl."""
    rows = folder.metrics()
    losses = [row["loss"] for row in rows if "loss" in row]
    eval_losses = [row["eval_loss"] for row in rows if "eval_loss" in row]
    return (losses or [None])[-1], (eval_losses or [None])[-1]
