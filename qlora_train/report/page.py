"""The page of a run, and the page that compares runs: what stands on them, as one self-contained HTML file.

Everything that came from data, recipes or models is escaped by the template engine. A page loads nothing: no
script, no font, no picture from elsewhere.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from importlib.resources import files
from typing import Any

from jinja2 import Environment

from qlora_train.device.step_clock import BETWEEN_STEPS, OF_A_STEP, Cause
from qlora_train.plan.words import duration
from qlora_train.recipe import Recipe
from qlora_train.recipe.yaml_file import yaml_text
from qlora_train.report.adapter_facts import ModuleFacts
from qlora_train.report.chart import Chart, Series, smoothed
from qlora_train.report.run_facts import WARM_UP_STEPS, RunFacts
from qlora_train.units import GIB

NUM_COLORS = 8
_MOST_SAMPLES, _MOST_LETTERS, _MOST_RUNS = 20, 2000, NUM_COLORS
_NO_NUMBERS = 99
_TIME = "Where a step's time went"
_WITHOUT_WARM_UP = f"without the first {WARM_UP_STEPS} steps"
_LONG_WAIT = 0.2
"""The share of a step from which on a wait is worth a remark."""
_REMEDIES = {
    Cause.ROWS: "the cache folder (QLORA_TRAIN_CACHE) on a faster disk, fewer other programs on this machine",
    Cause.WEIGHTS: "more memory.vram, so that more weights stay on the device; memory.weights=ram instead of "
    "disk; a larger training.batch_size, as a copied layer serves all micro-batches of a group",
    Cause.ACTIVATIONS: "memory.activations=recompute, or more memory.vram, so that more stays on the device",
}


@dataclass(frozen=True)
class Bar:
    """A bar of parts. parts: (name, percent of the whole bar, color)."""

    label: str
    parts: Sequence[tuple[str, float, int]]


@dataclass(frozen=True)
class Section:
    """A part of a page: lines, bars, charts, a table (folded away under `folded`, where that is said), a
    text. numbers_from: the first column of numbers."""

    title: str
    lines: Sequence[str] = ()
    bars: Sequence[Bar] = ()
    charts: Sequence[Chart] = ()
    head: Sequence[str] = ()
    rows: Sequence[Sequence[str]] = ()
    numbers_from: int = _NO_NUMBERS
    folded: str = ""
    text: str = ""

    @property
    def is_of_texts(self) -> bool:
        """Whether its table has no numbers: a narrow screen shows the cells of a row below each other."""
        return self.numbers_from == _NO_NUMBERS


def run_page(run: RunFacts, modules: Sequence[ModuleFacts]) -> str:
    """The page of a run. modules: of its newest adapter; empty: there is none yet."""
    sections = [
        *_memory(run),
        *_time(run),
        *_data(run),
        *_samples(run),
        *_adapter(modules),
        *_receipts(run),
        Section("Recipe", folded="recipe.yaml, resolved", text=run.recipe.to_yaml()),
    ]
    return _render(run.name, _subtitle(run), _tiles(run), run.charts(), sections)


def comparison_page(runs: Sequence[RunFacts]) -> str:
    """A page with the losses of several runs, and the keys of their recipes that differ."""
    shown = runs[:_MOST_RUNS]
    charts = []
    for title, key, note in (
        ("Loss", "loss", ""),
        ("Evaluation loss", "eval_loss", _on_other_rows(shown)),
        ("Gradient norm", "grad_norm", ""),
    ):
        lines = [_line(run, key, color) for color, run in enumerate(shown)]
        charts.append(Chart(title, "optimizer step", [line for line in lines if line.points], note=note))
    head = ["", *(run.name for run in runs)]
    figures = list(zip(*(_tiles(run) for run in runs), strict=True))
    rows = [[of_runs[0][0], *(value for _, value in of_runs)] for of_runs in figures]
    sections = [
        Section("Figures", head=head, rows=rows, numbers_from=1),
        *_compared_time(runs),
        Section("Recipe keys that differ", head=head, rows=list(_differing(runs))),
    ]
    more = [f"charts show the first {_MOST_RUNS} of {len(runs)} runs"] if len(runs) > _MOST_RUNS else []
    title = " · ".join(run.name for run in shown)
    return _render(title, more, [], [chart for chart in charts if not chart.is_empty], sections)


def _render(
    title: str,
    subtitle: Sequence[str],
    tiles: Sequence[tuple[str, str]],
    charts: Sequence[Chart],
    sections: Sequence[Section],
) -> str:
    source = (files("qlora_train.report") / "page.html").read_text(encoding="utf-8")
    template = Environment(autoescape=True, trim_blocks=True).from_string(source)
    return template.render(title=title, subtitle=subtitle, tiles=tiles, charts=charts, sections=sections)


def _subtitle(run: RunFacts) -> list[str]:
    model, lora = run.recipe.model, run.recipe.lora
    last = run.steps[-1]["step"] if run.steps else 0
    of = f" of {run.num_steps}" if run.num_steps else ""
    return [
        f"{model.base}, {model.quantization}, {model.compute_dtype}",
        run.plan.get("lora") or f"LoRA rank {lora.rank}",
        f"step {last}{of}, {run.num_tokens:,} tokens",
    ]


def _tiles(run: RunFacts) -> list[tuple[str, str]]:
    """(label, value) of the figures at the top."""
    best, seconds = run.best_evaluation, run.median_step_seconds
    planned, measured = run.plan.get("step_vram_bytes"), run.plan.get("measured_step_vram_bytes")
    planned_seconds = run.plan.get("step_seconds")
    return [
        ("last loss", _figure(run.last_loss, ".4f")),
        ("best evaluation loss", _figure(best and best[1], ".4f")),
        ("step of the best evaluation", _figure(best and best[0], "d")),
        (f"seconds a step, median {_WITHOUT_WARM_UP}", _figure(seconds, ".3g")),
        ("seconds a step, planned", _figure(planned_seconds, ".3g")),
        ("peak of a step, measured", _size(measured)),
        ("peak of a step, planned", _size(planned)),
    ]


def _figure(value: Any, form: str) -> str:
    return "–" if value is None else format(value, form)


def _size(num_bytes: int | None) -> str:
    if num_bytes is None:
        return "–"
    return f"{num_bytes / GIB:.2f} GiB" if num_bytes >= GIB / 10 else f"{num_bytes / 2**20:.1f} MiB"


def _memory(run: RunFacts) -> Iterator[Section]:
    """Planned bytes of a step by cause, beside what was measured."""
    planned = run.planned_bytes()
    if not planned:
        return
    whole = sum(num_bytes for _, num_bytes in planned)
    measured = run.plan.get("measured_step_vram_bytes")
    widest = max(whole, measured or 0)
    main, rest = planned[: NUM_COLORS - 1], planned[NUM_COLORS - 1 :]
    if rest:
        main = [*main, ("everything else", sum(num_bytes for _, num_bytes in rest))]
    parts = [
        (f"{cause} {_size(num_bytes)}", 100 * num_bytes / widest, color)
        for color, (cause, num_bytes) in enumerate(main)
    ]
    bars = [Bar(f"planned, at the peak of a step: {_size(whole)}", parts)]
    if measured is not None:
        bars.append(
            Bar(
                f"measured: {_size(measured)} ({measured / whole - 1:+.1%})",
                [("", 100 * measured / widest, 7)],
            )
        )
    yield Section("Memory on the device", lines=run.plan.get("changes", []), bars=bars)


def _time(run: RunFacts) -> Iterator[Section]:
    """The seconds of a step by cause, beside the plan's."""
    if not (spent := run.mean_seconds()):
        return
    lines, wait = [], max(_REMEDIES, key=lambda cause: spent.get(cause, 0.0))
    if (share := spent.get(wait, 0.0) / sum(spent.values())) > _LONG_WAIT:
        lines.append(f"{share:.0%} of a step is {wait.in_words}. What would shorten it: {_REMEDIES[wait]}.")
    took = {cause: run.total_seconds(cause) for cause in Cause}
    if between := [f"{cause.in_words} {duration(took[cause])}" for cause in BETWEEN_STEPS if took[cause]]:
        steps_took = duration(sum(took[cause] for cause in OF_A_STEP))
        lines.append(f"Besides the steps, which took {steps_took} in all: {', '.join(between)}.")
    bars = [_time_bar(f"measured, mean of a step {_WITHOUT_WARM_UP}", spent)]
    if planned := run.planned_seconds():
        bars.append(_time_bar("planned", planned))
    found = run.seconds_by_step().items()
    series = [Series(cause.in_words, points, OF_A_STEP.index(cause)) for cause, points in found]
    chart = Chart("Seconds of a step", "optimizer step", series, y_from_zero=True, is_stacked=True)
    yield Section(_TIME, lines=lines, bars=bars, charts=[chart] if len(series[0].points) > 1 else [])


def _time_bar(label: str, seconds: Mapping[Cause, float]) -> Bar:
    whole = sum(seconds.values())
    parts = [
        (f"{cause.in_words} {part / whole:.1%}", 100 * part / whole, OF_A_STEP.index(cause))
        for cause, part in seconds.items()
    ]
    return Bar(f"{label}: {duration(whole)}", parts)


def _compared_time(runs: Sequence[RunFacts]) -> Iterator[Section]:
    """The seconds of a step of several runs by cause, as far as they were measured."""
    if bars := [_time_bar(run.name, seconds) for run in runs if (seconds := run.mean_seconds())]:
        yield Section(_TIME, lines=[f"Means {_WITHOUT_WARM_UP}."], bars=bars)


def _data(run: RunFacts) -> Iterator[Section]:
    if lines := run.plan.get("introduction"):
        yield Section("What was trained", lines=lines)


def _samples(run: RunFacts) -> Iterator[Section]:
    """The answers to each prompt of `training.samples`, by step."""
    steps = sorted({row["step"] for row in run.samples})
    if not steps:
        return
    shown = sorted({steps[0], steps[len(steps) // 2], steps[-1]})
    answers: dict[str, dict[int, str]] = {}
    for row in run.samples:
        answers.setdefault(_prompt_text(row.get("prompt", "")), {})[row["step"]] = _cut(
            str(row.get("answer", ""))
        )
    rows = [
        [_cut(prompt), *(of.get(step, "") for step in shown)]
        for prompt, of in list(answers.items())[:_MOST_SAMPLES]
    ]
    yield Section("The same prompts", head=["prompt", *(f"step {step}" for step in shown)], rows=rows)


def _prompt_text(prompt: Any) -> str:
    """A prompt as text: itself, or the messages of a conversation, a line each."""
    if not isinstance(prompt, list):
        return str(prompt)
    return "\n".join(f"{message['role']}: {message['content']}" for message in prompt)


def _cut(text: str) -> str:
    return text if len(text) <= _MOST_LETTERS else f"{text[:_MOST_LETTERS]} …"


def _adapter(modules: Sequence[ModuleFacts]) -> Iterator[Section]:
    """The size of every module's update, by layer, and all of it as a table."""
    if not modules:
        return
    names = list(dict.fromkeys(facts.name for facts in modules))
    charts = [
        Chart(title, "layer", [line for line in _by_layer(modules, names, key) if line.points], True)
        for title, key in (("Norm of the update", "norm"), ("Effective rank of the update", "effective_rank"))
    ]
    has_amplification = any(facts.amplification is not None for facts in modules)
    head = ["module", "norm", "effective rank", "largest singular values"]
    rows = [
        [
            facts.path,
            f"{facts.norm:.4g}",
            f"{facts.effective_rank:.2f} of {len(facts.singular_values)}",
            "  ".join(f"{value:.3g}" for value in facts.singular_values[:4]),
            *([_figure(facts.amplification, ".2f")] if has_amplification else []),
        ]
        for facts in modules
    ]
    lines = [
        "Norm: Frobenius, of s B A. Effective rank: the exponential of the entropy of its singular values.",
    ]
    if has_amplification:
        head.append("amplification")
        lines.append("Amplification: the update's norm over that of the base's weight in its directions.")
    yield Section(
        "The adapter from inside",
        lines=lines,
        charts=[chart for chart in charts if not chart.is_empty],
        head=head,
        rows=rows,
        numbers_from=1,
        folded=f"all {len(modules)} modules",
    )


def _by_layer(modules: Sequence[ModuleFacts], names: Sequence[str], key: str) -> Iterator[Series]:
    for color, name in enumerate(names):
        of_name = [facts for facts in modules if facts.name == name and facts.layer is not None]
        points = [(float(facts.layer or 0), getattr(facts, key)) for facts in of_name]
        yield Series(name, points, color % NUM_COLORS)


def _receipts(run: RunFacts) -> Iterator[Section]:
    for folder, receipt in run.receipts.items():
        figures = receipt.get("figures", [])
        rows = [
            [
                f["model"],
                f"{f['loss']:.4f}",
                f"{f['loss'] - receipt['trained_loss']:+.4f}",
                f"{f['kl']:.1e}",
                f"{f['top1']:.1%}",
            ]
            for f in figures
        ]
        yield Section(
            f"Receipt of {folder}",
            lines=[f"{receipt.get('num_tokens', 0):,} supervised tokens {receipt.get('source', '')}"],
            head=["", "loss", "difference", "KL", "top-1 agreement"],
            rows=[["base + adapter as trained", f"{receipt['trained_loss']:.4f}", "", "", ""], *rows],
            numbers_from=1,
        )


def _line(run: RunFacts, key: str, color: int) -> Series:
    """A column of a run's metrics.jsonl as one of several lines, of many steps a smoothed one."""
    points, span = run.points(key), run.smoothing_span()
    if span is None or key == "eval_loss":
        return Series(run.name, points, color)
    return Series(f"{run.name}, mean over about {span} steps", smoothed(points, span), color)


def _on_other_rows(runs: Sequence[RunFacts]) -> str:
    """What to say of evaluation losses where the recipes' keys that decide on the rows and tokens of an
    evaluation differ; empty: nothing."""
    evaluated = [run for run in runs if run.evaluations]
    without = {"data.packing"}
    if not any(isinstance(run.recipe.data.eval, float) for run in evaluated):
        without |= {"data.train", "training.seed"}  # they decide only on what is split off
    keys = [key for key, *_ in _differing(evaluated) if key.startswith("data.") or key == "training.seed"]
    if not (deciding := [key for key in keys if key not in without]):
        return ""
    return (
        f"The recipes differ in {', '.join(deciding)}: these losses may be of different held-out rows, which "
        "are not comparable."
    )


def _differing(runs: Sequence[RunFacts]) -> Iterator[list[str]]:
    """(key, its value in each run as YAML) where not all are the same."""
    flat = [_values_by_key(run.recipe) for run in runs]
    for key in flat[0] if flat else ():
        values = [yaml_text(of[key]).strip() for of in flat]
        if len(set(values)) > 1:
            yield [key, *map(_cut, values)]


def _values_by_key(recipe: Recipe) -> dict[str, Any]:
    """The value of every `section.key`, inside which defaults are left out."""
    every, written = recipe.model_dump(mode="json"), recipe.model_dump(mode="json", exclude_defaults=True)
    return {
        f"{section}.{key}": written.get(section, {}).get(key, value)
        for section, values in every.items()
        for key, value in values.items()
    }
