"""Prints a plan: whether it fits, placement, times, advice, and a table of all bytes.

It reads the plain values of `Plan.to_dict`, so that a cached plan is printed without importing torch.
"""

from __future__ import annotations

from collections.abc import Mapping
from itertools import groupby
from typing import Any

from rich.console import Console
from rich.table import Table

from qlora_train.plan.request import PlanRequest
from qlora_train.plan.words import duration, gib, largest_in_words, parameter_count
from qlora_train.units import GIB
from qlora_train.weights.execution_plan import ExecutionPlan

Values = Mapping[str, Any]
_PHASES = ("load", "step", "evaluation", "generate", "save", "merge")
_HOST_PLACES = ("pinned RAM", "RAM", "disk")
_MOST_RUNS = 4


def print_plan(
    plan: Values,
    request: PlanRequest,
    console: Console,
    num_steps: int | None = None,
    *,
    details: bool = False,
) -> None:
    """Print a plan. plan: `Plan.to_dict`, with advice. num_steps: optimizer steps of the run, if known.
    details: the table too."""
    for line in _lines(plan, request, num_steps):
        console.print(line, markup=False, highlight=False, soft_wrap=True)
    if details:
        console.print(_table(plan["rows"]))


def _lines(plan: Values, request: PlanRequest, num_steps: int | None) -> list[str]:
    recipe = request.recipe
    largest = max(_PHASES[:4], key=lambda phase: sum(_on_device(plan, phase).values()))
    return [
        *summary_lines(plan, num_steps),
        f"model: {plan['model_type']}, {parameter_count(plan['num_parameters'])} parameters, "
        f"{len(plan['weights'])} layers, {recipe.model.quantization}",
        plan["lora"],
        f"device: {request.device_text}" + (f", {plan['in_words']}" if request.target.is_accelerator else ""),
        *([f"assumed: {request.assumed}"] if request.assumed else []),
        f"rates: {plan['rates']['source']}",
        *residency_lines(ExecutionPlan.from_dict(plan["execution"])),
        f"largest on the device, in the {largest} phase: {largest_in_words(_on_device(plan, largest), 3)}",
        *plan["remarks"],
        *(
            ["what to try:", *(f"  {line}" for line in plan["advice"])]
            if plan["fits"] and plan["advice"]
            else []
        ),
    ]


def summary_lines(plan: Values, num_steps: int | None) -> list[str]:
    """Two lines of text: whether the plan fits, and how long it takes."""
    return [_verdict(plan), _time_line(plan, num_steps)]


def _verdict(plan: Values) -> str:
    device = "VRAM" if plan["device"] != "cpu" else "RAM for tensors"
    sizes = [
        f"{gib(plan[f'{key}_bytes'])} of {gib(plan[f'{budget}_budget_bytes'])} {name}"
        for key, budget, name in (
            ("peak_vram", "vram", device),
            ("peak_ram", "ram", "RAM" if plan["device"] != "cpu" else "RAM in all"),
            ("disk", "disk", "disk"),
        )
    ]
    return f"{'fits' if plan['fits'] else 'DOES NOT FIT'}: {', '.join(sizes)}"


def _time_line(plan: Values, num_steps: int | None) -> str:
    evaluation = duration(plan["evaluation_seconds_per_million_tokens"])
    per_million = duration(plan["seconds_per_million_tokens"])
    end = f"{per_million} per million tokens of training data and epoch"
    if num_steps is not None:  # how many tokens the data has is known when they are read
        end = f"{duration(num_steps * plan['step_seconds'])} to the end ({num_steps} steps)"
    micro_batches = plan["num_micro_batches"]
    bins = plan["micro_batch_size"]
    return (
        f"time: {duration(plan['step_seconds'])} per step of {plan['tokens_per_step']:,} tokens "
        f"({micro_batches} micro-batch{'es' if micro_batches > 1 else ''} of {bins}), {end}; "
        f"an evaluation takes {evaluation} per million tokens"
    )


def residency_lines(plan: ExecutionPlan) -> list[str]:
    """Two lines of text: the placement of weights, and the activations and tiles of a step."""
    cut = [f"{plan.num_groups} group{'s' if plan.num_groups > 1 else ''} of micro-batches"]
    if plan.inputs != "resident":
        cut.append("layer inputs in RAM")
    if plan.mlp_tile_tokens is not None:
        cut.append(f"MLP in tiles of {plan.mlp_tile_tokens} tokens")
    cut.append(f"loss in blocks of {plan.loss_tokens} tokens x {plan.head_tile_rows} rows")
    if plan.hold_dequantized:
        cut.append("a layer dequantized once per visit")
    return [
        f"weights: layers {_runs([_where(place) for place in plan.weights])}; "
        f"embedding {_where(plan.embedding)}, head {_where(plan.head)}",
        f"activations: layers {_runs([str(policy) for policy in plan.activations])}; {', '.join(cut)}",
    ]


def _where(place: str) -> str:
    return {"resident": "resident", "ram": "from RAM", "disk": "from disk"}[place]


def _runs(values: list[str]) -> str:
    """The values of consecutive layers as ranges ("0 to 5 ram, 6 resident"), or as counts if too long."""
    parts, first = [], 0
    for value, alike in groupby(values):
        last = first + len(list(alike)) - 1
        parts.append(f"{first}{f' to {last}' if last > first else ''} {value}")
        first = last + 1
    if len(parts) <= _MOST_RUNS:
        return ", ".join(parts)
    counts = (f"{values.count(value)} {value}" for value in dict.fromkeys(values))
    return f"{', '.join(counts)}, spread evenly"


def _on_device(plan: Values, phase: str) -> dict[str, int]:
    """Bytes on the device by cause, in one phase."""
    rows = (row for row in plan["rows"] if row["phase"] == phase and row["place"] not in _HOST_PLACES)
    return {row["cause"]: row["bytes"] for row in rows}


def _table(rows: list[dict[str, Any]]) -> Table:
    """A table of GiB by place and cause, with a column for each phase."""
    table = Table(box=None, pad_edge=False, title="GiB", title_justify="left", title_style="bold")
    table.add_column("place", no_wrap=True)
    table.add_column("cause")
    for phase in _PHASES:
        table.add_column(phase, justify="right")
    places = sorted(
        dict.fromkeys(row["place"] for row in rows),
        key=lambda place: _HOST_PLACES.index(place) if place in _HOST_PLACES else -1,
    )
    for place in places:
        of_place = [row for row in rows if row["place"] == place]
        for cause in dict.fromkeys(row["cause"] for row in of_place):
            table.add_row(place, cause, *_cells([row for row in of_place if row["cause"] == cause]))
        table.add_row(place, "total", *_cells(of_place), style="bold")
    return table


def _cells(rows: list[dict[str, Any]]) -> list[str]:
    sums = [sum(row["bytes"] for row in rows if row["phase"] == phase) for phase in _PHASES]
    return [f"{num_bytes / GIB:.3f}" if num_bytes else "" for num_bytes in sums]
