"""`eval`: the run's own evaluation loss, and answers compared as text."""

from __future__ import annotations

import json
import math
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from loaded_models import answers_of
from tiny_runs import write_base, write_rows

from qlora_train import Recipe, train
from qlora_train.cli import main
from qlora_train.generate.evaluate_command import _rows
from qlora_train.generate.evaluation import evaluate, text_metrics
from qlora_train.generate.model_folder import find_model
from qlora_train.generate.sampling import Sampling
from qlora_train.plan.planned_walk import GenerateSize
from qlora_train.weights.streaming import StreamedWeights


def rows(numbers: range) -> list[dict[str, Any]]:
    return [
        {"messages": [{"role": "user", "content": f"{n}?"}, {"role": "assistant", "content": f"{n % 7}" * 3}]}
        for n in numbers
    ]


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("evaluated")
    write_rows(folder / "held-out.jsonl", rows(range(100, 112)))
    recipe = {
        "model": {"base": str(write_base(folder / "base")), "compute_dtype": "float32"},
        "lora": {"rank": 8, "alpha": 16},
        "data": {
            "train": str(write_rows(folder / "rows.jsonl", rows(range(32)))),
            "eval": str(folder / "held-out.jsonl"),
            "sequence_length": 64,
        },
        "training": {
            "output_dir": str(folder / "run"),
            "max_steps": 12,
            "batch_size": 2,
            "learning_rate": 0.02,
        },
    }
    return train(Recipe.from_dict(recipe)).run_dir


def evaluated(capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, str, str]:
    capsys.readouterr()
    code = main(["eval", *arguments, "--max-new-tokens", "6"])
    found = capsys.readouterr()
    return code, found.out, found.err


def test_the_loss_is_the_runs_own(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "answers.jsonl"
    code, text, _ = evaluated(capsys, str(run), "--json", "--base", "--num-answers", "5", "--out", str(out))
    scores = json.loads(text)
    metrics = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    last = [row["eval_loss"] for row in metrics if "eval_loss" in row][-1]
    assert code == 0 and scores["trained"]["loss"] == pytest.approx(last, rel=1e-6)
    assert scores["trained"]["perplexity"] == pytest.approx(math.exp(last), rel=1e-6)
    assert scores["base"]["loss"] > last and scores["base"]["num_tokens"] == scores["trained"]["num_tokens"]

    written = [json.loads(line) for line in out.read_text().splitlines()]
    assert [row["reference"] for row in written] == [f"{n % 7}" * 3 for n in range(100, 105)]
    model = find_model(run).load(GenerateSize((30,) * 5, 6))
    answers = answers_of(model, [f"{n}?" for n in range(100, 105)], Sampling(6))
    assert [row["trained"] for row in written] == answers
    expected = text_metrics(answers, [row["reference"] for row in written])
    assert {name: scores["trained"][name] for name in expected} == expected


def test_streamed_layers_are_fetched_once_for_many_rows(run: Path) -> None:
    source = find_model(run)
    assert source.recipe is not None
    memory = source.recipe.memory.model_copy(update={"weights": "disk"})
    source = replace(source, recipe=source.recipe.model_copy(update={"memory": memory}))
    data, _ = _rows(source, None)
    model = source.load(GenerateSize((1,), 1, data.sequence_length, data.num_bins))
    alone = replace(model, plan=replace(model.plan, evaluation_group=1))
    assert isinstance(model.decoder.weights, StreamedWeights)
    assert model.plan.evaluation_group == data.num_bins > 2
    ring, reads, losses = model.decoder.weights.ring, [0], []
    for one in (model, alone):
        losses.append(evaluate(one, data, [], max_new_tokens=1, batch_size=1).loss)
        reads.append(ring.num_reads)
    model.decoder.close()
    assert losses[0] == losses[1] and reads[1] < reads[2] - reads[1]


def test_other_rows_and_a_table(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = write_rows(tmp_path / "more.jsonl", rows(range(200, 203)))
    code, text, _ = evaluated(capsys, str(run), "--data", str(file), "--base")
    assert code == 0 and f"3 answers ({file})" in text
    assert text.splitlines()[1].split() == ["trained", "base"]
    assert {line.split("  ")[0] for line in text.splitlines()[2:]} == {
        *("loss", "perplexity", "exact match", "ROUGE-1", "ROUGE-2", "ROUGE-L", "BLEU")
    }
    code, text, _ = evaluated(capsys, str(run.parent / "base"), "--data", str(file), "--num-answers", "0")
    assert code == 0 and "exact" not in text and text.splitlines()[1].split() == ["model"]


def test_texts_have_a_loss_and_no_answers(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = write_rows(tmp_path / "texts.jsonl", [{"text": "abc abc"}, {"text": "xyz"}])
    code, text, _ = evaluated(capsys, str(run.parent / "base"), "--data", str(file))
    assert code == 0 and "12 supervised tokens, 0 answers" in text and "exact" not in text


def test_what_cannot_be_evaluated(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    base = str(run.parent / "base")
    assert evaluated(capsys, base)[2].count("nothing is held out") == 1
    assert "without an adapter" in evaluated(capsys, base, "--data", "x.jsonl", "--base")[2]
    code, _, message = evaluated(capsys, str(run), "--data", str(tmp_path / "nowhere.jsonl"))
    assert code == 2 and "nowhere.jsonl" in message
    monkeypatch.setitem(sys.modules, "sacrebleu", None)
    code, _, message = evaluated(capsys, str(run))
    assert code == 2 and "sacrebleu is not installed: pip install 'qlora-train[eval]'" in message


def test_metrics_of_texts() -> None:
    assert text_metrics([], []) == {}
    found = text_metrics([" the cat sat ", "a dog"], ["the cat sat", "no way"])
    assert found["exact match"] == 50 and found["ROUGE-1"] == 50 and found["BLEU"] < 100
    assert list(text_metrics(["a b c d e"], ["a b c d e"]).values()) == pytest.approx([100.0] * 5)
