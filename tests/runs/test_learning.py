"""Whole runs learn, log what they promise, and have the losses that were once written down here."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from typing import Any

import pytest
from tiny_runs import losses_of, metrics_of, recipe_values, reversal_rows, write_rows

from qlora_train.errors import UserError
from qlora_train.recipe import Recipe, load_recipe
from qlora_train.train import TrainResult, train

# torch 2.13, CPU, fp32, training.kernels: reference
# fmt: off
GOLDEN_LOSSES = [
    5.77190, 5.82840, 5.56412, 5.16661, 4.97687, 4.75930, 4.60323, 4.42525, 4.22925, 4.25318,
    4.21005, 4.18437, 4.05220, 4.01187, 4.06363, 4.03510, 4.14272, 3.96643, 3.99611, 4.06711,
]
# fmt: on


def run(base: Path, train_file: Path, output_dir: Path, **sections: Any) -> TrainResult:
    return train(Recipe.from_dict(recipe_values(base, train_file, output_dir, **sections)))


def golden_run(base: Path, train_file: Path, tmp_path: Path, kernels: str) -> list[float]:
    training = {"max_steps": 20, "optimizer": "adamw", "weight_decay": 0.01, "kernels": kernels}
    result = run(base, train_file, tmp_path / "run", lora={"dropout": 0.1}, training=training)
    return losses_of(result.run_dir)


@pytest.mark.parametrize("packing", [True, False])
def test_a_tiny_task_is_learnt(tmp_path: Path, base: Path, packing: bool) -> None:
    rows = write_rows(tmp_path / "rows.jsonl", reversal_rows(60, letters="ab"))
    result = run(
        base,
        rows,
        tmp_path / "run",
        lora={"rank": 8, "alpha": 16},
        data={"packing": packing, "eval": 0.1},
        training={"max_steps": 60, "learning_rate": 2e-2, "eval_every": 25},
    )
    losses = losses_of(result.run_dir)
    evaluations = {row["step"]: row["eval_loss"] for row in metrics_of(result.run_dir) if "eval_loss" in row}
    assert result.num_steps == len(losses) == 60 and result.loss == losses[-1]
    assert losses[0] > 5 and sum(losses[-5:]) / 5 < 0.4 * losses[0]
    assert list(evaluations) == [0, 25, 50, 60] and result.eval_loss == evaluations[60]
    assert evaluations[0] > 5 and evaluations[60] < 0.4 * evaluations[0]


def test_golden_losses(tmp_path: Path, base: Path, train_file: Path) -> None:
    losses = golden_run(base, train_file, tmp_path, "reference")
    assert losses == pytest.approx(GOLDEN_LOSSES, rel=0, abs=1e-4)


def test_the_fused_paths_follow_the_reference(tmp_path: Path, base: Path, train_file: Path) -> None:
    reference = golden_run(base, train_file, tmp_path / "reference", "reference")
    fused = golden_run(base, train_file, tmp_path / "auto", "auto")
    assert fused == pytest.approx(reference, rel=0, abs=1e-4)
    assert fused != reference  # another path was taken


def test_the_run_folder_and_its_metrics(tmp_path: Path, base: Path, train_file: Path) -> None:
    result = run(
        base,
        train_file,
        tmp_path / "run",
        data={"packing": False},  # 28 bins of one row each
        training={"epochs": 1.5, "save_every": 4, "keep_checkpoints": 2, "warmup_ratio": 0.2},
    )
    assert result.num_steps == 11  # 42 rows, 4 a step
    *rows, ending = [json.loads(line) for line in (result.run_dir / "metrics.jsonl").read_text().splitlines()]
    assert ending["step"] == 11 and ending["checkpoint_seconds"] > 0
    assert [row["step"] for row in rows] == list(range(1, 12))
    promised = {"step", "loss", "learning_rate", "grad_norm", "num_tokens", "num_supervised_tokens"}
    assert all(promised | {"tokens_per_second", "peak_bytes"} <= row.keys() for row in rows)
    assert [row["learning_rate"] for row in rows[:3]] == pytest.approx([5e-3 / 3, 1e-2 / 3, 5e-3], rel=1e-12)
    # BOS, word, colon, word, EOS; the word and EOS are supervised
    lengths = [len(row["completion"]) for row in reversal_rows(28)]
    assert sum(row["num_tokens"] for row in rows[:7]) == sum(2 * length + 3 for length in lengths)
    assert sum(row["num_supervised_tokens"] for row in rows[:7]) == sum(length + 1 for length in lengths)
    assert rows[10]["num_tokens"] < rows[9]["num_tokens"]  # two rows were left for the last step
    saved = sorted(path.name for path in (result.run_dir / "checkpoints").iterdir())
    assert saved == ["step-11", "step-8"]
    assert load_recipe(result.run_dir / "recipe.yaml").model.compute_dtype == "float32"


def test_a_tracker_that_is_not_installed_is_refused(
    tmp_path: Path, base: Path, train_file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    find_spec = importlib.util.find_spec

    def without_tensorboard(name: str) -> object:
        return None if name == "tensorboard" else find_spec(name)

    monkeypatch.setattr(importlib.util, "find_spec", without_tensorboard)
    with pytest.raises(UserError, match="report_to: tensorboard is not installed"):
        run(base, train_file, tmp_path / "run", training={"report_to": ["tensorboard"]})
    assert not (tmp_path / "run").exists()
