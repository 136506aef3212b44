"""`train` as its users call it, on the shape of a large model with random quantized weights: what fits, how
near the plan is, how fast it is, and whether runs that ought to be equal are.

Every run is a whole one, in a folder of its own; what it did is read from its files, what it held from the
allocator, over the timed steps. Weights are random bytes (random_base.py): 8B are made in seconds, 16-bit
weights never exist. Rows are documents of one length that fill their bins: the most that any data take.

With a trace two more steps follow, one under the profiler, one with the allocator's history (traces.py).
"""

from __future__ import annotations

import gc
import json
import shutil
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from benchmarks.gpu_suite.traces import Tracer
from benchmarks.pieces.figures import compute_device, compute_dtype
from benchmarks.pieces.inputs import rows_of, word_tokenizer
from benchmarks.pieces.ours import plan_figures, recipe_values, training_figures_of
from benchmarks.process import answer
from benchmarks.random_base import make_random_base, write_config
from qlora_train.device.compute import ComputeDevice
from qlora_train.device.context import in_use_before
from qlora_train.plan.split import batch_size_of
from qlora_train.quant.formats import Quantization
from qlora_train.recipe import Recipe
from qlora_train.train import train
from qlora_train.weights.cache_key import cache_root

NUM_WARM_UP = 2
NUM_TRACED = 2
PLAN_TOLERANCE = 0.05


def measure(arguments: dict[str, Any]) -> dict[str, Any]:
    """arguments: work, out (folders); model: name and config; recipe: sections; runs: by name, sections that
    replace those; row_tokens; num_timed; trace: what files in `out` begin with, or None; same_bytes: whether
    all runs must end with the same adapter; remove_base: at the end."""
    in_use_before()  # as in a user's process, which does not look at the device before `train` does
    work = Path(arguments["work"])
    recipes = {name: _recipe(work, arguments, changes, name) for name, changes in arguments["runs"].items()}
    first = next(iter(recipes.values()))
    base_seconds = _make_inputs(first, arguments)
    runs, problems, remarks = {}, list[str](), [f"base made in {base_seconds:.0f} s"]
    for name, recipe in recipes.items():
        tracer = Tracer(compute_device(), Path(arguments["out"]), arguments.get("trace"))
        runs[name] = _run(recipe, arguments, tracer)
        problems += [f"{name}: {problem}" for problem in problems_of(recipe, runs[name], compute_device())]
        remarks += tracer.remarks
    if arguments.get("same_bytes"):
        said = differences({name: Path(recipe.training.output_dir) for name, recipe in recipes.items()})
        problems += said
        remarks += [] if said else [f"the same bytes: {', '.join(recipes)}"]
    for recipe in recipes.values():
        shutil.rmtree(recipe.training.output_dir)
    if arguments.get("remove_base"):
        for folder in cache_root().glob(f"{arguments['model']['name']}-*"):
            shutil.rmtree(folder)
    return {"runs": runs, "remarks": remarks, "problems": problems}


def _recipe(
    work: Path, arguments: Mapping[str, Any], changes: Mapping[str, Mapping[str, Any]], name: str
) -> Recipe:
    """Of one run. It takes every row once."""
    num_steps = arguments["num_timed"] + (NUM_TRACED if arguments.get("trace") else 0)
    sections = {**arguments["recipe"], **changes}
    training, data = sections["training"], sections["data"]
    model = arguments["model"]["name"]
    settings = {
        "inputs": {
            "base": str(work / "models" / model),
            "rows": str(work / f"{model}-{data['sequence_length']}-{arguments['row_tokens']}.jsonl"),
        },
        "rank": 16,
        "sequence_length": data["sequence_length"],
        "micro_batch_size": training["micro_batch_size"],
        "accumulation": training["gradient_accumulation_steps"],
        "optimizer": training.get("optimizer", "paged_adamw_8bit"),
        "num_warm_up": NUM_WARM_UP,
        "num_timed": num_steps,
        "recipe": {section: values for section, values in sections.items() if section != "data"},
    }
    run = work / "runs" / f"{model}-{name.replace(' ', '-')}"
    shutil.rmtree(run, ignore_errors=True)  # of a call that was stopped
    return Recipe.from_dict(recipe_values(settings, run))


def _make_inputs(recipe: Recipe, arguments: Mapping[str, Any]) -> float:
    """Config, tokenizer, quantized base and rows, where they are not there; the seconds that it took."""
    started = time.perf_counter()
    config = arguments["model"]["config"]
    folder = write_config(Path(recipe.model.base), config)
    word_tokenizer(config["vocab_size"]).save_pretrained(folder)
    quantization = Quantization(recipe.model.quantization, recipe.model.double_quant)
    make_random_base(folder, quantization, compute_dtype(), cache_root())
    training, row_tokens = recipe.training, arguments["row_tokens"]
    num_rows = batch_size_of(training, num_ranks=1)
    num_rows *= (training.max_steps or 0) * recipe.data.sequence_length // row_tokens
    sizes = {"kind": "texts", "num_rows": num_rows, "num_tokens": row_tokens}
    lines = (json.dumps(row) + "\n" for row in rows_of(sizes, config["vocab_size"]))
    Path(recipe.data.train[0].path).write_text("".join(lines), encoding="utf-8")
    return time.perf_counter() - started


def _run(recipe: Recipe, arguments: Mapping[str, Any], tracer: Tracer) -> dict[str, Any]:
    """The figures of one run."""
    num_steps = NUM_WARM_UP + arguments["num_timed"]
    held: dict[str, int] = {}

    def on_step(row: Mapping[str, Any]) -> None:
        if row["step"] == NUM_WARM_UP and compute_device().is_accelerator:
            compute_device().reset_peaks()
        if row["step"] == num_steps:
            held.update(device_bytes(compute_device()))
        if row["step"] >= num_steps:
            tracer.next_step()

    gc.collect()
    compute_device().release_cached()
    started = time.time()
    run = train(recipe, on_step=on_step).run_dir
    figures = training_figures_of(run, Path(recipe.model.base), num_steps, NUM_WARM_UP, started)
    return (
        figures
        | plan_figures(run / "plan.json", figures["step_seconds"])
        | held
        | tracer.figures
        | host_bound(tracer.figures, figures["step_seconds"])
    )


def host_bound(traced: Mapping[str, Any], step_seconds: float) -> dict[str, float]:
    """host_bound_share: the part of an untraced step in which the device did nothing, by how long it was busy
    in the traced one: the profiler delays the host, not the kernels. Empty without a trace."""
    if "profile" not in traced:
        return {}
    busy_milliseconds = traced["profile"]["busy_share"] * traced["profile"]["step_milliseconds"]
    return {"host_bound_share": 1 - busy_milliseconds / 1e3 / step_seconds}


def device_bytes(device: ComputeDevice) -> dict[str, int]:
    """What the allocator gave and held at most since its peaks were reset, what was asked of it before it
    rounds, how often it met its limit; and what is on the device besides (the context, and others' memory).
    Empty on the CPU."""
    if not device.is_accelerator:
        return {}
    stats = device.memory_stats()
    return {
        "device_peak_bytes": device.peak_allocated_bytes,
        "device_reserved_peak_bytes": device.peak_reserved_bytes,
        "requested_peak_bytes": stats["requested_bytes.all.peak"],
        "context_bytes": device.total_bytes - device.free_bytes - device.reserved_bytes,
        "num_alloc_retries": stats["num_alloc_retries"],
        "num_ooms": stats["num_ooms"],
    }


def problems_of(recipe: Recipe, figures: Mapping[str, Any], device: ComputeDevice) -> list[str]:
    """Where a budget was given: whether it held, and whether the plan was right."""
    found = [f"ran out of memory: {change}" for change in figures["changes"]]
    budget = recipe.memory.vram_bytes
    if budget is None:
        return found
    off = figures["measured_step_device_bytes"] / figures["planned_step_device_bytes"] - 1
    if abs(off) > PLAN_TOLERANCE:
        found.append(f"a step took {off:+.1%} of what was planned")
    if device.is_accelerator:
        held = figures["device_reserved_peak_bytes"] + figures["context_bytes"]
        if held > budget:
            found.append(f"held {held / 2**30:.2f} GiB with the context, {budget / 2**30:.2f} GiB were given")
    return found


def differences(runs: Mapping[str, Path]) -> list[str]:
    """Runs whose adapters are not those of the first, byte for byte, and what their plans cut differently."""
    (reference, first), *others = runs.items()
    expected = (first / "adapter" / "adapter_model.safetensors").read_bytes()
    plan = _cuts(first)
    found = []
    for name, run in others:
        if (run / "adapter" / "adapter_model.safetensors").read_bytes() != expected:
            cuts = {key: (plan[key], value) for key, value in _cuts(run).items() if value != plan[key]}
            found.append(f"{name} ends with other bytes than {reference}; sums are cut differently: {cuts}")
    return found


def _cuts(run: Path) -> dict[str, Any]:
    """What of a plan changes the order of sums."""
    execution = json.loads((run / "plan.json").read_text())["execution"]
    return {key: execution[key] for key in ("num_groups", "loss_tokens", "head_tile_rows", "mlp_tile_tokens")}


if __name__ == "__main__":
    answer(measure)
