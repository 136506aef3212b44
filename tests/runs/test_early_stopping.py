"""A run whose evaluations no longer improve ends early, by the same rule however often it is resumed."""

from __future__ import annotations

import math
import shutil
from pathlib import Path
from typing import Any

import pytest
from tiny_runs import adapter_bytes, metrics_of, recipe_values

from qlora_train.adapter.trained_on import progress_of
from qlora_train.errors import RecipeError
from qlora_train.recipe import EarlyStopping, Recipe, load_recipe
from qlora_train.train import train
from qlora_train.train.checkpoint import TrainState, list_checkpoints

NUM_STEPS = 14


@pytest.mark.parametrize(
    ("losses", "min_delta", "stops_after"),
    [
        ([3.0, 2.0, 2.0, 2.5], 0.0, 4),
        ([3.0, 2.0, 2.5, 1.9, 2.0, 1.95], 0.0, 6),
        ([3.0, 2.75, 2.5, 2.25], 0.25, None),  # slow, but it adds up: 2.5 is 0.5 below 3.0
        ([3.0, 2.75, 2.8, 2.5], 0.25, 3),
        ([3.0, math.nan, math.nan], 0.0, 3),
        ([3.0, 2.5, 2.0], 0.0, None),
    ],
)
def test_patience_counts_evaluations_since_one_that_improved(
    losses: list[float], min_delta: float, stops_after: int | None
) -> None:
    stopping = EarlyStopping(patience=2, min_delta=min_delta)
    state, stopped = TrainState(), None
    for number, loss in enumerate(losses, 1):
        state.count_evaluation(loss, stopping)
        if stopped is None and state.stops_early(stopping):
            stopped = number
    assert stopped == stops_after
    assert not state.stops_early(None)


def test_a_loss_that_is_not_finite_is_never_the_best() -> None:
    state, stopping = TrainState(), EarlyStopping(patience=1)
    for state.step, loss in enumerate([math.nan, math.inf]):
        assert not state.count_evaluation(loss, stopping)
    assert state.early_end_line(9).endswith("none gave a finite loss")
    state.step = 2
    assert state.count_evaluation(2.0, stopping) and (state.best_step, state.best_eval_loss) == (2, 2.0)
    state.step = 3
    assert not state.count_evaluation(math.nan, stopping) and state.best_step == 2
    assert state.early_end_line(9).endswith("the best was 2.0000 after step 2")


@pytest.mark.parametrize(
    ("section", "keys", "problem"),
    [
        ("training", {"eval_every": 5}, "looks at the evaluation loss: write data.eval too"),
        ("data", {"eval": 0.1}, "needs evaluations on the way: write training.eval_every too"),
        ("training", {"eval_every": 5, "early_stopping": {}}, "patience: required, and missing"),
        (
            "training",
            {"eval_every": 5, "early_stopping": {"patienc": 1}},
            "patienc: unknown key; did you mean patience",
        ),
    ],
)
def test_what_cannot_stop_a_run_is_refused(section: str, keys: dict[str, Any], problem: str) -> None:
    values = recipe_values(
        Path("base"), Path("rows"), Path("run"), training={"early_stopping": {"patience": 2}}
    )
    values[section] |= keys
    with pytest.raises(RecipeError, match=rf"training\.early_stopping.*{problem}"):
        Recipe.from_dict(values)


def values_of(base: Path, train_file: Path, run: Path, stopping: dict[str, Any] | None) -> dict[str, Any]:
    """A run that soon learns its few training rows by heart, and the evaluation loss goes up."""
    training = {
        "max_steps": NUM_STEPS,
        "learning_rate": 0.1,
        "lr_schedule": "constant",
        "eval_every": 1,
        "save_every": 2,
        "keep_checkpoints": 99,
        "optimizer": "adamw",
        "early_stopping": stopping,
    }
    return recipe_values(base, train_file, run, data={"eval": 0.2}, training=training)


def test_it_stops_and_a_resume_stops_at_the_same_step(
    tmp_path: Path,
    base: Path,
    train_file: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    stopping = {"patience": 2, "min_delta": 0.01}
    whole, early, resumed = (tmp_path / name for name in ("whole", "early", "resumed"))
    train(Recipe.from_dict(values_of(base, train_file, whole, None)))
    capsys.readouterr()
    end = train(Recipe.from_dict(values_of(base, train_file, early, stopping))).num_steps
    said = capsys.readouterr().out
    assert 3 <= end < NUM_STEPS, "the run must stop on the way, and not at once"
    assert f"stopped early after step {end} of {NUM_STEPS}: 2 evaluations without improvement" in said
    assert metrics_of(early) == [row for row in metrics_of(whole) if row["step"] <= end]
    assert list_checkpoints(early / "checkpoints")[-1] == end
    assert progress_of(early / "adapter") == (end, NUM_STEPS)

    shutil.copytree(early, resumed)  # as if it had been killed just before the end
    shutil.rmtree(resumed / "checkpoints" / f"step-{end}")
    shutil.rmtree(resumed / "adapter")
    assert train(load_recipe(resumed), resume=True).num_steps == end
    assert adapter_bytes(resumed) == adapter_bytes(early)
    assert metrics_of(resumed) == metrics_of(early)

    before = {path: path.read_bytes() for path in early.rglob("*") if path.is_file()}
    assert train(load_recipe(early), resume=True).num_steps == end
    assert {path: path.read_bytes() for path in early.rglob("*") if path.is_file()} == before

    patient = load_recipe(early, ["training.early_stopping.patience=99"])
    assert train(patient, resume=True).num_steps == NUM_STEPS
    assert adapter_bytes(early) == adapter_bytes(whole)
    assert metrics_of(early) == metrics_of(whole)
