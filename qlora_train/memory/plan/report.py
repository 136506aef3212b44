"""A plan for people: what goes where, what it takes by cause, how long it lasts, what each knob would change.

The same content as plan.json (`Plan.to_dict`), as a table.
"""

from __future__ import annotations

from itertools import groupby

from rich.console import Console
from rich.table import Table

from qlora_train.memory.execution import ExecutionPlan
from qlora_train.memory.plan.ghost_flash import flash_gap_bytes
from qlora_train.memory.plan.plan import Plan, Row, duration, gib
from qlora_train.memory.plan.workload import Workload

_SMALL_BYTES = 2**20


def print_plan(plan: Plan, console: Console, device_text: str, num_steps: int | None = None) -> None:
    """device_text: which card or machine this is for. num_steps: optimizer steps to the end, where known."""
    say = _Lines(console)
    shape = plan.workload.shape
    exact = "" if shape.is_exact else f" ({shape.model_type} is not modelled exactly: an estimate)"
    say(f"{shape.model_type}, {shape.num_parameters / 1e9:.2f}B parameters, {shape.num_layers} layers{exact}")
    say(f"for {device_text}, budget {gib(plan.budget_bytes)}")
    if plan.workload.target.is_accelerator:
        say(f"  {plan.workload.target.in_words(deterministic=plan.workload.deterministic)}")
    for line in positions_line(max(plan.workload.documents), shape.max_positions):
        say(f"  {line}")
    if line := _documents_line(plan.workload):
        say(f"  {line}")
    for phase, rows in groupby(sorted(plan.rows(), key=_position), key=lambda row: row.phase):
        console.print(_phase_table(phase, list(rows)))
    for line in residency_lines(plan.execution):
        say(line)
    seconds, tokens = plan.step_seconds, plan.workload.tokens_per_step
    if num_steps is None:  # how many tokens the data has is known when they are read
        end = f"{duration(plan.seconds_per_million_tokens)} per million tokens of training data and epoch"
    else:
        end = f"{duration(num_steps * seconds)} to the end ({num_steps} steps)"
    say(f"time: {duration(seconds)} per step of {tokens:,} tokens, {end}")
    flops, copied_bytes = plan.time.flops, plan.time.copied_bytes
    say(f"  arithmetic {flops / 1e12:.1f} TFLOP, copies {copied_bytes / 1e9:.1f} GB a step")
    say(f"  rates {plan.rates.source}")
    verdict = "fits" if plan.fits else "DOES NOT FIT"
    say(f"{verdict}: peak {gib(plan.peak_vram_bytes)} on the device, {gib(plan.peak_ram_bytes)} of RAM")
    for problem in plan.problems:
        say(f"  {problem}")
    if plan.advice:
        say("what each knob would save:" if plan.fits else "what would fit, one at a time:")
        for line in plan.advice:
            say(f"  {line}")


def positions_line(sequence_length: int, max_positions: int) -> list[str]:
    """What is to be said where documents may be longer than the model's positions."""
    if sequence_length <= max_positions:
        return []
    return [
        f"data.sequence_length {sequence_length:,} is beyond the {max_positions:,} positions that "
        "config.json states: rotary positions go on, but the base has not seen longer documents"
    ]


def _documents_line(workload: Workload) -> str:
    """What many documents take in attention's backward pass, where the data are not known yet."""
    number, shape = workload.most_documents, workload.shape
    grouped = shape.num_heads != shape.num_kv_heads
    serves = workload.target.varlen_serves(
        workload.itemsize, shape.head_dim, grouped=grouped, has_softcap=shape.has_softcap
    )
    if workload.known_most_documents or workload.reference or not serves:
        return ""
    gap_bytes = flash_gap_bytes(shape.num_heads, shape.head_dim)
    return (
        f"for up to {number} documents in a micro-batch; with more, attention's scratch grows by "
        f"{gap_bytes / 2**20:.1f} MiB for each"
    )


_PHASES = ("load", "step", "evaluation", "generate", "save", "merge")


_AFTER_THE_DEVICE = ("pinned RAM", "RAM", "disk")


def _position(row: Row) -> tuple[int, int]:
    """Phases in the order of a run; in each the device first, the disk last."""
    after = _AFTER_THE_DEVICE.index(row.place) if row.place in _AFTER_THE_DEVICE else -1
    return _PHASES.index(row.phase), after


class _Lines:
    """Prints text as it is."""

    def __init__(self, console: Console) -> None:
        self._console = console

    def __call__(self, line: str) -> None:
        self._console.print(line, markup=False, highlight=False, soft_wrap=True)


def _phase_table(phase: str, rows: list[Row]) -> Table:
    """One phase: place, cause, bytes; small causes of a place in one line."""
    table = Table(title=phase, title_justify="left", title_style="bold", box=None, pad_edge=False)
    table.add_column("place")
    table.add_column("cause")
    table.add_column("GiB", justify="right")
    for place, of_place in groupby(rows, key=lambda row: row.place):
        parts = sorted(of_place, key=lambda row: -row.num_bytes)
        shown = [row for row in parts if row.num_bytes >= _SMALL_BYTES]
        rest = sum(row.num_bytes for row in parts) - sum(row.num_bytes for row in shown)
        for row in shown:
            table.add_row(place, row.cause, f"{row.num_bytes / 2**30:.3f}")
        if rest:
            table.add_row(place, "other", f"{rest / 2**30:.3f}")
        total = sum(row.num_bytes for row in parts)
        table.add_row(place, "total", f"{total / 2**30:.3f}", style="bold")
    return table


def residency_lines(plan: ExecutionPlan) -> list[str]:
    """What is where, per run of layers that are alike, and how the step is cut."""
    lines = []
    index = 0
    for (weights, activations), alike in groupby(zip(plan.weights, plan.activations, strict=True)):
        number = len(list(alike))
        last = index + number - 1
        lines.append(
            f"  layer{'s' if number > 1 else ''} {index}{f' to {last}' if number > 1 else ''}: "
            f"weights {_where(weights)}, activations {activations}"
        )
        index += number
    if len(lines) > 8:
        lines = [
            f"  weights: {_counted(plan.weights)}; activations: {_counted(plan.activations)} "
            "(resident layers spread evenly; per layer in --json)"
        ]
    cut = [f"embedding {_where(plan.embedding)}", f"head {_where(plan.head)}"]
    cut.append(f"{plan.num_groups} group{'s' if plan.num_groups > 1 else ''} of micro-batches")
    if plan.inputs != "resident":
        cut.append("remembered inputs in RAM")
    if plan.mlp_tile_tokens is not None:
        cut.append(f"MLP in tiles of {plan.mlp_tile_tokens} tokens")
    cut.append(f"loss in blocks of {plan.loss_tokens} tokens x {plan.head_tile_rows} rows")
    if plan.hold_unpacked:
        cut.append("a layer unpacked once per visit")
    return ["residency:", *lines, f"  {', '.join(cut)}"]


def _where(place: str) -> str:
    return {"resident": "resident", "ram": "from RAM", "disk": "from disk"}[place]


def _counted(values: tuple[str, ...]) -> str:
    return ", ".join(f"{values.count(value)} {value!s}" for value in dict.fromkeys(values))
