"""A run's page: every figure on it is in the run's files, nothing is loaded, hostile text stays text."""

from __future__ import annotations

import json
import math
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from report_page import Page
from tiny_models import write_checkpoint
from tiny_runs import recipe_values, reversal_rows, write_base, write_rows

from qlora_train import Recipe, train
from qlora_train.adapter.adapter_config import AdapterConfig
from qlora_train.adapter.adapter_files import save_adapter
from qlora_train.cli import main
from qlora_train.device.step_clock import BETWEEN_STEPS, OF_A_STEP, Cause
from qlora_train.plan.words import duration
from qlora_train.report.adapter_facts import adapter_facts
from qlora_train.report.chart import MOST_POINTS, Chart, Series, smoothed
from qlora_train.report.run_facts import RunFacts
from qlora_train.report.write import write_report

EVIL = "</script><script>alert(1)</script>\x1b[2J\u202e & <b>"


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("reported")
    rows = write_rows(folder / "rows.jsonl", reversal_rows(12))
    values = recipe_values(write_base(folder / "base"), rows, folder / "run")
    values["data"]["eval"] = 0.25
    values["training"] |= {"max_steps": 4, "eval_every": 2, "save_every": 2}
    return train(Recipe.from_dict(values)).run_dir


def metrics_of(run: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def test_training_leaves_a_page_with_its_figures(run: Path) -> None:
    page = Page((run / "report.html").read_text(encoding="utf-8"))
    rows = metrics_of(run)
    for title, name, key in (
        ("Loss", "loss of each step", "loss"),
        ("Loss", "evaluation loss", "eval_loss"),
        ("Gradient norm", "norm", "grad_norm"),
        ("Learning rate", "rate", "learning_rate"),
        ("Tokens per second", "speed", "tokens_per_second"),
    ):
        expected = [(row["step"], row[key]) for row in rows if key in row]
        found = page.values(title, name)
        assert [round(x) for x, _ in found] == [x for x, _ in expected]
        scale = max(abs(y) for _, y in expected)
        assert [y for _, y in found] == pytest.approx([y for _, y in expected], abs=2e-4 * scale)
    last = [row["loss"] for row in rows if "loss" in row][-1]
    assert f"{last:.4f}" in page.text and "planned, at the peak of a step" in page.text
    assert "9 rows -> 9 documents" in page.text and "evaluation: 3 rows -> 3 documents" in page.text
    assert page.links == [] and "script" not in page.tags and "link" not in page.tags
    assert (
        "url(" not in (run / "report.html").read_text() and "@import" not in (run / "report.html").read_text()
    )


def test_where_the_time_went_is_that_of_the_files(run: Path) -> None:
    page = Page((run / "report.html").read_text(encoding="utf-8"))
    rows = [row for row in metrics_of(run) if row["step"] > 2 and "loss" in row]
    plan = json.loads((run / "plan.json").read_text())
    spent = {cause: [row.get(cause.key, 0.0) for row in rows] for cause in OF_A_STEP}
    spent = {cause: seconds for cause, seconds in spent.items() if any(seconds)}
    whole = sum(map(sum, spent.values()))
    (chart,) = (chart for chart in page.charts if chart["title"].startswith("Seconds of a step"))
    assert list(chart["lines"]) == [cause.in_words for cause in spent] and len(spent) >= 5
    for cause, seconds in spent.items():
        found = page.heights("Seconds of a step", cause.in_words)
        assert [round(x) for x, _ in found] == [row["step"] for row in rows]
        assert [y for _, y in found] == pytest.approx(seconds, abs=2e-4 * chart["y1"])
        assert f"{cause.in_words} {sum(seconds) / whole:.1%}" in page.text
    assert f"measured, mean of a step without the first 2 steps: {duration(whole / len(rows))}" in page.text
    planned = plan["seconds_of_a_step"]
    assert sum(planned.values()) == pytest.approx(plan["step_seconds"]) and planned["backward_seconds"] > 0
    assert f"planned: {duration(plan['step_seconds'])}" in page.text
    for key, seconds in planned.items():
        words = key.removesuffix("_seconds").replace("_", " ")
        assert (f"{words} {seconds / plan['step_seconds']:.1%}" in page.text) == (seconds > 0)


def test_what_came_after_the_last_step_counts(run: Path) -> None:
    """Evaluations before the first step, after the second and the last, checkpoints after the latter two."""
    rows, text = metrics_of(run), (run / "report.html").read_text(encoding="utf-8")
    took = {
        cause: {(row["step"], "loss" in row): row[cause.key] for row in rows if cause.key in row}
        for cause in BETWEEN_STEPS
    }
    assert set(took[Cause.EVALUATION]) == {(1, True), (3, True), (4, False)}
    assert set(took[Cause.CHECKPOINT]) == {(3, True), (4, False)}
    steps_took = sum(row.get(cause.key, 0.0) for row in rows for cause in OF_A_STEP)
    evaluations, checkpoints = (
        duration(sum(took[cause].values())) for cause in (Cause.EVALUATION, Cause.CHECKPOINT)
    )
    assert (
        f"Besides the steps, which took {duration(steps_took)} in all: evaluation {evaluations}, "
        f"checkpoint {checkpoints}." in text
    )


def test_steps_of_a_version_without_times_are_in_no_mean(run: Path, tmp_path: Path) -> None:
    mixed = copy_with_seconds(run, tmp_path / "mixed", forward_seconds=2.0)
    older, newer = (mixed / "metrics.jsonl").read_text().split("\n")[2:4]
    untimed = {key: value for key, value in json.loads(older).items() if key != "forward_seconds"}
    (mixed / "metrics.jsonl").write_text(f"{json.dumps(untimed)}\n{newer}\n")
    assert RunFacts.read(mixed).mean_seconds() == {Cause.FORWARD: 2.0}


def copy_with_seconds(run: Path, folder: Path, **seconds: float) -> Path:
    """The run, with these causes in every step."""
    folder.mkdir()
    for name in ("recipe.yaml", "plan.json"):
        (folder / name).write_bytes((run / name).read_bytes())
    kept = [
        {key: value for key, value in row.items() if not key.endswith("_seconds")} for row in metrics_of(run)
    ]
    lines = [json.dumps(row | seconds) for row in kept if "loss" in row]
    (folder / "metrics.jsonl").write_text("\n".join(lines) + "\n")
    return folder


@pytest.mark.parametrize(
    ("cause", "remedy"),
    [
        ("rows", "the cache folder"),
        ("weights", "more memory.vram"),
        ("activations", "memory.activations=recompute"),
    ],
)
def test_a_long_wait_is_said_with_what_would_shorten_it(
    run: Path, tmp_path: Path, cause: str, remedy: str
) -> None:
    waits = {"waiting_for_rows_seconds": 1.0, "waiting_for_weights_seconds": 1.0}
    waits |= {f"waiting_for_{cause}_seconds": 3.0}
    page = write_report(copy_with_seconds(run, tmp_path / "slow", forward_seconds=5.0, **waits)).read_text()
    assert f"of a step is waiting for {cause}. What would shorten it: {remedy}" in page
    assert page.count("What would shorten it") == 1
    waits = dict.fromkeys(waits, 0.9)
    page = write_report(copy_with_seconds(run, tmp_path / "fast", forward_seconds=5.0, **waits)).read_text()
    assert "What would shorten it" not in page and "waiting for" in page


def test_a_run_without_times_has_none_on_its_page(run: Path, tmp_path: Path) -> None:
    page = write_report(copy_with_seconds(run, tmp_path / "older")).read_text()
    assert "time went" not in page and "Tokens per second" in page


def test_samples_and_hostile_text_stay_text(run: Path, tmp_path: Path) -> None:
    copy = tmp_path / "run"
    copy.mkdir()
    for name in ("recipe.yaml", "plan.json", "metrics.jsonl"):
        (copy / name).write_bytes((run / name).read_bytes())
    lines = [{"step": step, "prompt": EVIL, "answer": f"{EVIL} {step}" + "x" * 5000} for step in (0, 2, 4)]
    lines.append({"step": 0, "prompt": [{"role": "user", "content": "Who?"}], "answer": "me"})
    (copy / "samples.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    (copy / "merged").mkdir()
    figures = {"model": EVIL, "loss": 1.25, "kl": 0.5, "top1": 0.75}
    receipt = {"source": EVIL, "num_tokens": 7, "trained_loss": 1.0, "figures": [figures]}
    (copy / "merged" / "receipt.json").write_text(json.dumps(receipt))
    page = Page(write_report(copy).read_text(encoding="utf-8"))
    assert "script" not in page.tags and "b" in page.tags and page.tags.count("html") == 1
    assert (
        page.text.count("alert(1)") == 1 + 3 + 2
        and "+0.2500" in page.text
        and "user: Who?" in page.text
        and len(page.text) < 30_000
    )


def test_a_narrow_screen_shows_the_newest_answer(run: Path, tmp_path: Path) -> None:
    """Its table has no columns there: each cell stands below the one before and names its column."""
    copy = copy_with_seconds(run, tmp_path / "run")
    lines = [{"step": step, "prompt": "Who?", "answer": f"answer {step}"} for step in (0, 2, 4)]
    (copy / "samples.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    html = write_report(copy).read_text()
    cells = [("prompt", "Who?"), *((f"step {step}", f"answer {step}") for step in (0, 2, 4))]
    assert Page(html).cells[:4] == cells and 'class="stacks"' in html
    (narrow,) = re.findall(r"@media \(max-width: \d+px\) \{(.*?\})\s*\}", html, re.DOTALL)
    assert "td) { display: block; }" in narrow and "content: attr(data-head)" in narrow


def test_a_run_that_has_not_stepped_and_damaged_files(run: Path, tmp_path: Path) -> None:
    (tmp_path / "recipe.yaml").write_bytes((run / "recipe.yaml").read_bytes())
    assert "No step has been taken yet" in write_report(tmp_path).read_text()
    (tmp_path / "plan.json").write_text("{")
    (tmp_path / "metrics.jsonl").write_bytes(
        b"\xff\n[]\n" + (run / "metrics.jsonl").read_bytes() + b'{"step":'
    )
    page = Page(write_report(tmp_path).read_text())
    assert len(page.values("Loss", "loss of each step")) == 4


def test_several_runs_are_compared(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    other = tmp_path / "other"
    other.mkdir()
    changed = (run / "recipe.yaml").read_text().replace("rank: ", "rank: 3", 1)
    (other / "recipe.yaml").write_text(changed)
    (other / "metrics.jsonl").write_bytes((run / "metrics.jsonl").read_bytes())
    out = tmp_path / "both.html"
    assert main(["report", str(run), str(other), "--out", str(out)]) == 0
    assert capsys.readouterr().out.splitlines() == [
        str(run / "report.html"),
        str(other / "report.html"),
        str(out),
    ]
    page = Page(out.read_text())
    assert len(page.values("Loss", run.name)) == len(page.values("Loss", "other")) == 4
    assert "lora.rank" in page.text and "model.base" not in page.text
    for name in (run.name, "other"):
        assert re.search(f"{name}: [0-9.]+ s\n.*forward [0-9.]+%", page.text)
    assert main(["report", str(tmp_path)]) == 2
    assert main(["report", str(run), "--out", str(out)]) == 2
    assert main(["report", str(run), str(other), "--out", str(tmp_path / "no" / "x.html")]) == 2


def test_a_page_that_cannot_be_written_ends_no_training(run: Path, tmp_path: Path) -> None:
    from qlora_train.report.write import refresh_report

    assert refresh_report(run) is None
    assert "not a run folder" in (refresh_report(tmp_path) or "")


@pytest.mark.parametrize("rank", [1, 3, 40])
def test_singular_values_are_those_of_the_whole_update(tmp_path: Path, rank: int) -> None:
    write_checkpoint(tmp_path / "base")
    generator = torch.Generator().manual_seed(rank)
    path = "model.layers.1.mlp.up_proj"
    a, b = torch.randn(rank, 64, generator=generator), torch.randn(112, rank, generator=generator)
    config = AdapterConfig("base", rank, 2 * rank, target_modules=["up_proj"])
    save_adapter(tmp_path / "adapter", config, {path: (a, b)})
    (facts,) = adapter_facts(tmp_path / "adapter", tmp_path / "base")
    update = (2.0 * b @ a).double()
    values = torch.linalg.svdvals(update)[:rank]
    assert facts.singular_values[: len(values)] == pytest.approx(values.tolist(), rel=1e-5)
    assert facts.norm == pytest.approx(float(update.norm()), rel=1e-6)
    shares = values / values.sum()
    assert facts.effective_rank == pytest.approx(float(torch.exp(-(shares * shares.log()).sum())), rel=1e-4)
    from safetensors.torch import load_file

    weight = load_file(tmp_path / "base" / "model.safetensors")[f"{path}.weight"].double()
    u, _, v = torch.linalg.svd(update)
    seen = (u[:, :rank].T @ weight @ v[:rank].T).norm()
    assert facts.amplification == pytest.approx(float(update.norm() / seen), rel=1e-4)
    assert (facts.layer, facts.name) == (1, "up_proj")


def test_an_update_of_zero_has_no_rank(tmp_path: Path) -> None:
    config = AdapterConfig("base", 2, 2, target_modules=["q_proj"])
    save_adapter(tmp_path, config, {"model.layers.0.self_attn.q_proj": (torch.ones(2, 4), torch.zeros(4, 2))})
    (facts,) = adapter_facts(tmp_path)
    assert facts.norm == 0 and facts.effective_rank == 0 and facts.amplification is None


def test_charts_of_odd_values() -> None:
    points = [(1.0, 2.0), (2.0, math.nan), (3.0, math.inf), (4.0, 5.0), (5.0, 6.0)]
    svg = Chart("t", "x", [Series("s", points)]).svg()
    assert svg.count("<circle") == 1 and svg.count("<polyline") == 1  # a gap, and a point alone
    assert "nan" not in svg and "inf" not in svg
    for constant in ([(1.0, 0.0)], [(1.0, 3.0), (2.0, 3.0)], [(5.0, -1e-9)]):
        assert "data-y0" in Chart("t", "x", [Series("s", constant)]).svg()
    many = [(float(x), 1.0) for x in range(25_000)]
    drawn = re.findall(r'points="([^"]*)"', Chart("t", "x", [Series("s", many)]).svg())
    assert len(drawn[0].split()) <= MOST_POINTS
    assert Chart("t", "x", [Series("s", [(1.0, math.nan)])]).is_empty
    assert [y for _, y in smoothed([(0.0, 2.0), (1.0, 2.0), (2.0, math.nan)], 5)] == pytest.approx([2.0, 2.0])


def test_areas_are_stacked_and_thinned_together() -> None:
    points = [(float(x), float(x % 7)) for x in range(25_000)]
    stack = [Series(name, points) for name in ("below", "above")]
    page = Page(Chart("t", "x", stack, y_from_zero=True, is_stacked=True).svg())
    below, above = (page.heights("t", name) for name in ("below", "above"))
    assert len(below) <= MOST_POINTS and page.charts[0]["y0"] == 0
    assert [y for _, y in below] == pytest.approx([y for _, y in above], abs=0.01)
    assert max(y for _, y in page.values("t", "above")) == pytest.approx(
        2 * max(y for _, y in below), abs=0.01
    )


def test_facts_of_a_run(run: Path) -> None:
    facts = RunFacts.read(run)
    rows = metrics_of(run)
    evaluations = [(row["eval_loss"], row["step"]) for row in rows if "eval_loss" in row]
    assert facts.best_evaluation == min(evaluations)[::-1]
    assert facts.num_tokens == sum(row.get("num_tokens", 0) for row in rows)
    assert facts.num_steps == 4


def test_the_adapter_is_the_newest(run: Path, tmp_path: Path) -> None:
    """Of a run that was finished and goes on, the folder `adapter` is the one of before."""
    copy = tmp_path / "run"
    shutil.copytree(run, copy)
    assert RunFacts.read(copy).adapter == copy / "checkpoints" / "step-4" / "adapter"
    shutil.rmtree(copy / "checkpoints")
    assert RunFacts.read(copy).adapter == copy / "adapter"
    shutil.rmtree(copy / "adapter")
    assert RunFacts.read(copy).adapter is None
