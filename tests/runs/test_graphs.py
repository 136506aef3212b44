"""Whole runs whose layers are replayed, on a tape (tests/graph_tape.py): the loop begins graphs after the
metered steps, lets them go before an evaluation, and the bytes of the run stay what they are."""

from __future__ import annotations

from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
import torch
from graph_tape import DenseAttention, TapeRecorder
from tiny_runs import adapter_bytes, metrics_of, recipe_values

from qlora_train.errors import TrainingFailure, UserError
from qlora_train.model import decoder
from qlora_train.recipe import Recipe
from qlora_train.train.graph_choice import GraphChoice
from qlora_train.train.loop import STEPS_METERED
from qlora_train.train.run import train

NUM_STEPS, EVAL_EVERY = 8, 5


def recipe(base: Path, train_file: Path, folder: Path, **training: Any) -> Recipe:
    training = {"max_steps": NUM_STEPS, "eval_every": EVAL_EVERY} | training
    values = recipe_values(base, train_file, folder, data={"eval": 0.2}, training=training)
    return Recipe.from_dict(values)


@pytest.fixture
def recorder(monkeypatch: pytest.MonkeyPatch) -> TapeRecorder:
    """In place of CUDA's, on a machine where nothing is in the way."""
    recorder = TapeRecorder()
    monkeypatch.setattr(decoder, "varlen_attention", lambda device: DenseAttention())
    monkeypatch.setattr(import_module("qlora_train.train.loop"), "CudaRecorder", lambda device: recorder)

    def choose(recipe: Recipe, *_: Any) -> GraphChoice:
        return GraphChoice(recipe.training.cuda_graphs is not False, "graphs it is")

    monkeypatch.setattr(import_module("qlora_train.train.setup"), "choose_graphs", choose)
    return recorder


def test_a_run_by_graphs_has_the_bytes_of_one_without(
    base: Path,
    train_file: Path,
    tmp_path: Path,
    recorder: TapeRecorder,
    capsys: pytest.CaptureFixture[str],
) -> None:
    train(recipe(base, train_file, tmp_path / "eager", cuda_graphs=False))
    assert recorder.num_captures == 0
    capsys.readouterr()
    train(recipe(base, train_file, tmp_path / "graphs", cuda_graphs="auto"))
    assert "graphs it is" in capsys.readouterr().out
    assert recorder.num_captures >= 4 and recorder.num_releases >= 1
    assert recorder.num_replays == 2 * (NUM_STEPS - STEPS_METERED)
    assert metrics_of(tmp_path / "graphs") == metrics_of(tmp_path / "eager")
    assert adapter_bytes(tmp_path / "graphs") == adapter_bytes(tmp_path / "eager")


def test_what_cannot_be_captured_is_said_in_a_run(
    base: Path,
    train_file: Path,
    tmp_path: Path,
    recorder: TapeRecorder,
    capsys: pytest.CaptureFixture[str],
) -> None:
    def refuse(number: int) -> None:
        raise RuntimeError("not today")

    recorder.at_capture = refuse
    train(recipe(base, train_file, tmp_path / "auto"))
    said = capsys.readouterr()
    assert "no longer used: the walk cannot be captured (not today)" in said.out + said.err
    with pytest.raises(TrainingFailure, match="not today"):
        train(recipe(base, train_file, tmp_path / "true", cuda_graphs=True))


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without a GPU")
def test_without_a_gpu_true_is_refused_before_anything_is_written_and_auto_says_why(
    base: Path, train_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(UserError, match=r"cuda_graphs: true is not possible here.*\n  there is no GPU"):
        train(recipe(base, train_file, tmp_path / "run", cuda_graphs=True))
    assert not (tmp_path / "run").exists()
    train(recipe(base, train_file, tmp_path / "run", max_steps=1, eval_every=1))
    assert "CUDA graphs: not used, because there is no GPU" in capsys.readouterr().out
    train(recipe(base, train_file, tmp_path / "silent", cuda_graphs=False, max_steps=1, eval_every=1))
    assert "graph" not in capsys.readouterr().out
