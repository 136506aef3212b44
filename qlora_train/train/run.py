"""Runs `train`, from a recipe to an adapter. All input is read before anything is written."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack, nullcontext
from dataclasses import asdict
from pathlib import Path

from accelerate import Accelerator
from rich.console import Console

from qlora_train.adapter.lora_targets import coverage
from qlora_train.data.building import open_data
from qlora_train.data.statistics import length_line, lengths_of, steps_advice
from qlora_train.device.memory_tracker import MemoryTracker
from qlora_train.device.settings import determinism_of_before, require_deterministic_products
from qlora_train.doctor.command import machine_lines
from qlora_train.kernels.on_device import find_device
from qlora_train.model.packed_tokens import PackedTokens
from qlora_train.plan.machine_plan import device_of_all
from qlora_train.plan.report import residency_lines
from qlora_train.plan.words import duration, gib, positions_line
from qlora_train.recipe import Recipe
from qlora_train.terminal_text import message
from qlora_train.train import OnStep, TrainResult
from qlora_train.train.agreement import facts_of, require_agreement
from qlora_train.train.loop import TrainLoop
from qlora_train.train.plan_log import PlanLog, SavedPlan, Setting
from qlora_train.train.resumed import lengthened_line
from qlora_train.train.run_folder import RunFolder
from qlora_train.train.setup import Prepared, RunContext, make_accelerator, prepare, resolve
from qlora_train.walk.optimizer import paging_lines
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
    ranks = find_ranks(accelerator.device)
    device = find_device(accelerator.device)
    for text in machine_lines(device, folder.path):
        log(text)
    require_deterministic_products(device.torch)
    target = device_of_all(device, ranks)
    recipe, base, dtype = resolve(recipe, target, ranks.number)
    data = open_data(recipe.data)
    recipe = recipe.model_copy(update={"data": data.section_with_format})
    folder.check(recipe, resume=resume)
    setting = Setting(**ranks.gather(asdict(Setting.of(recipe, target, ranks.number)))[0])
    plan_log = PlanLog(folder.plan_file, folder.checkpoints, setting, writes=accelerator.is_main_process)
    with ExitStack() as limits, ExitStack() as metering:
        limits.callback(device.limit_allocator, None)  # the process (a notebook) may go on
        meter = metering.enter_context(MemoryTracker(device))
        run = RunContext(recipe, base, dtype, device, ranks, target, log)
        saved = plan_log.read() if resume else None
        prepared = prepare(run, data, accelerator, saved, use_cache=use_cache)
        loop = TrainLoop(prepared, folder, plan_log, meter, metering.close, on_step)
        first = loop.resume(log) if resume else 0
        near = require_range(prepared.model.decoder, _first_micro_batch(prepared))
        introduction = _introduction(prepared, loop, first, resume=resume)
        for text in introduction:
            log(text)
        if near is not None:
            log(near)
        begun = folder.begun_recipe() if first else None
        if begun is not None and (line := lengthened_line(begun, prepared, loop.num_steps, first + 1)):
            log(line)
        require_agreement(ranks, facts_of(prepared, first))  # and no rank is still checking the folder
        if accelerator.is_main_process:
            folder.begin(recipe)
        if plan_log.moved:
            log(f"planned anew from step {first + 1} on ({', '.join(plan_log.moved)})")
        followed = SavedPlan(prepared.model.execution, prepared.model.plan.workload.split)
        values = prepared.model.plan.to_dict() | {
            "seconds_to_the_end": _planned_seconds(prepared, loop.num_steps),
            "introduction": introduction,
        }
        plan_log.begin(values, followed, first + 1)
        accelerator.init_trackers("qlora_train", config=_flat(recipe))
        try:
            loop.run()
        finally:
            prepared.model.decoder.close()
            accelerator.end_training()
    loss, eval_loss = _last_losses(folder)
    log(f"done: adapter in {folder.adapter}")
    return TrainResult(folder.path, folder.adapter, loop.step, loss, eval_loss)


def _introduction(prepared: Prepared, loop: TrainLoop, first: int, *, resume: bool) -> list[str]:
    """What is about to be trained, and how, in a few lines."""
    recipe, decoder, lora = prepared.recipe, prepared.model.decoder, prepared.model.lora
    plan, kept = prepared.model.plan, prepared.model.adapter.kept
    token_ids = prepared.model.adapter.config.token_ids
    no_checkpoint = f"{recipe.training.output_dir} holds no checkpoint: training starts at the beginning"
    return [
        *([no_checkpoint] if resume and not first else []),
        f"base {recipe.model.base} ({decoder.config.model_type}, {len(decoder.layers)} layers, "
        f"{recipe.model.quantization}), "
        f"{recipe.model.compute_dtype} on {decoder.device.torch}",
        f"{coverage(lora.ranks, decoder.linears, decoder.stacks)}; "
        + (f"rows of {len(token_ids)} tokens; " if token_ids else "")
        + f"{lora.masters.numel():,} trainable parameters",
        *(
            [f"the LoRA parameters on {', '.join(kept)} are applied and kept as they are, not trained"]
            if kept
            else []
        ),
        *_peft_lines(prepared),
        *prepared.train_data.report.lines(),
        length_line(lengths_of(prepared.train_data)),
        *(f"evaluation: {line}" for data in (prepared.eval_data,) if data for line in data.report.lines()),
        *positions_line(recipe.data.sequence_length, decoder.config.max_position_embeddings),
        *residency_lines(prepared.model.execution),
        *paging_lines(recipe.training.optimizer, decoder.device.description),
        f"planned: {gib(plan.step_vram_bytes)} of tensors on the device at the peak of a step, "
        f"{duration(plan.step_seconds)} a step, "
        f"{duration(_planned_seconds(prepared, loop.num_steps))} for all steps and evaluations",
        f"{loop.num_steps} optimizer steps of {_bins_of_a_step(prepared)}"
        + (f", going on after step {first}" if first else ""),
        *steps_advice(prepared.train_data, recipe.training),
    ]


def _peft_lines(prepared: Prepared) -> list[str]:
    """What PEFT makes of an adapter with projections beside a mixture of experts (shared experts, dense
    layers): it takes their names for the experts', and leaves them out without a word (seen with 0.21)."""
    names = {"gate_proj", "up_proj", "down_proj", "w1", "w2", "w3"}
    decoder, trained = prepared.model.decoder, prepared.model.lora.names
    beside = [path for path in trained if path in decoder.linears and path.rpartition(".")[2] in names]
    if not beside or not any(decoder.experts):
        return []
    return [
        f"peft may take {beside[0]} and others of its name for experts and leave them out: use this adapter "
        "through `export --to merged`, or train attention alone (lora.target_modules)"
    ]


def _planned_seconds(prepared: Prepared, num_steps: int) -> float:
    """Predicted seconds of all steps and evaluations."""
    plan, every, data = prepared.model.plan, prepared.recipe.training.eval_every, prepared.eval_data
    if data is None:
        return num_steps * plan.step_seconds
    num_evaluations = 2 + ((num_steps - 1) // every if every else 0)
    tokens = num_evaluations * data.num_bins * data.sequence_length
    return num_steps * plan.step_seconds + tokens / 1e6 * plan.evaluation_seconds_per_million_tokens


def _bins_of_a_step(prepared: Prepared) -> str:
    """The bins of a step, and their split into processes and micro-batches, as text."""
    split, number = prepared.model.plan.workload.split, prepared.accelerator.num_processes
    parts = [
        f"{number} process" + ("es" if number > 1 else ""),
        f"{split.num_micro_batches} x {split.micro_batch_size} in each",
    ]
    num_bins = prepared.recipe.training.bins_per_step()
    return f"{num_bins} bin{'s' if num_bins > 1 else ''} ({', '.join(parts)})"


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
