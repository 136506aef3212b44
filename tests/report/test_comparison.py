"""Several runs on one page: what is drawn and said of each is in its files, and of it alone."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from report_page import Page
from tiny_runs import recipe_values

from qlora_train import Recipe
from qlora_train.report.chart import smoothed
from qlora_train.report.write import write_comparison, write_report

TRAINED = Path("/rows.jsonl")


def written_run(folder: Path, rows: list[dict[str, Any]], **data: Any) -> Path:
    """A run of these rows of metrics.jsonl. data: keys of its recipe's section."""
    values = recipe_values(Path("/base"), TRAINED, Path("/run"))
    values["data"] |= {"eval": 0.25} | data
    folder.mkdir()
    (folder / "recipe.yaml").write_text(Recipe.from_dict(values).to_yaml())
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


def steps_of(losses: list[float]) -> list[dict[str, Any]]:
    """Rows of steps, as many as losses; the n-th takes n seconds."""
    common = {"num_tokens": 60, "grad_norm": 1.0}
    return [
        {"step": n, "loss": loss, "tokens_per_second": 60 / n, **common} for n, loss in enumerate(losses, 1)
    ]


def compared(tmp_path: Path, *runs: Path) -> Page:
    return Page(write_comparison(runs, tmp_path / "both.html").read_text())


def test_each_run_has_its_own_best_step(tmp_path: Path) -> None:
    evaluations = ([(0, 2.0), (4, 1.5), (8, 1.75)], [(4, 1.5), (8, 1.25)])
    runs = [
        written_run(tmp_path / name, [{"step": step, "eval_loss": loss} for step, loss in losses])
        for name, losses in zip("ab", evaluations, strict=True)
    ]
    page = compared(tmp_path, *runs)
    assert page.row("best evaluation loss") == ["1.5000", "1.2500"]
    assert page.row("step of the best evaluation") == ["4", "8"]


def test_few_steps_are_drawn_as_they_are_and_means_are_named(tmp_path: Path) -> None:
    few, many = ([float(n % 7) for n in range(num_steps)] for num_steps in (49, 200))
    runs = [written_run(tmp_path / f"of{len(of)}", steps_of(of)) for of in (few, many)]
    page = compared(tmp_path, *runs)
    assert [y for _, y in page.values("Loss", "of49")] == pytest.approx(few, abs=2e-3)
    assert [y for _, y in page.values("Gradient norm", "of49")] == pytest.approx([1.0] * 49, abs=2e-3)
    mean_of = "of200, mean over about 10 steps"
    for title in ("Loss", "Gradient norm"):
        (chart,) = (chart for chart in page.charts if chart["title"].startswith(title))
        assert list(chart["lines"]) == ["of49", mean_of]
    assert page.values("Loss", mean_of)[-1][1] == pytest.approx(smoothed_end(many), abs=2e-3)
    assert page.text.count(mean_of) == 2
    alone = [Page(write_report(path).read_text()) for path in runs]
    assert list(alone[0].charts[0]["lines"]) == ["loss of each step"] and "mean over" not in alone[0].text
    assert set(alone[1].charts[0]["lines"]) == {"loss of each step", "its mean over about 10 steps"}


def smoothed_end(losses: list[float]) -> float:
    return smoothed([(float(n), loss) for n, loss in enumerate(losses)], 10)[-1][1]


def test_the_median_says_which_steps_it_is_of(tmp_path: Path) -> None:
    runs = [written_run(tmp_path / name, steps_of([1.0] * 7)) for name in "ab"]
    label = "seconds a step, median without the first 2 steps"
    assert compared(tmp_path, *runs).row(label) == ["5", "5"]
    assert f"5{label}" in Page(write_report(runs[0]).read_text()).text


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        ({}, ""),
        ({"packing": False}, ""),
        ({"eval": 0.5}, "data.eval"),
        ({"sequence_length": 48, "too_long": "drop"}, "data.too_long, data.sequence_length"),
    ],
)
def test_evaluations_on_other_rows_are_said_to_be(tmp_path: Path, changed: dict[str, Any], said: str) -> None:
    rows = [{"step": 0, "eval_loss": 2.0}, {"step": 4, "eval_loss": 1.0}]
    runs = [written_run(tmp_path / "a", rows), written_run(tmp_path / "b", rows, **changed)]
    page = compared(tmp_path, *runs)
    text = page.text
    assert ("held-out rows" in text) == bool(said)
    assert not said or f"The recipes differ in {said}: these losses may be of different held-out" in text
    assert "eval" not in changed or page.row("data.eval") == ["0.25", "0.5"]


def test_rows_held_out_from_elsewhere_do_not_depend_on_the_trained_ones(tmp_path: Path) -> None:
    rows = [{"step": 0, "eval_loss": 2.0}]
    held_out = [{"path": str(TRAINED)}]
    trained = [{**held_out[0], "weight": 2.0}]
    runs = [
        written_run(tmp_path / "a", rows, eval=held_out),
        written_run(tmp_path / "b", rows, eval=held_out, train=trained),
    ]
    page = compared(tmp_path, *runs)
    assert "held-out rows" not in page.text
    path = held_out[0]["path"]
    assert page.row("data.train") == [f"- path: {path}", f"- path: {path}\n  weight: 2.0"]
