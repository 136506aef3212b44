"""`eval --tasks`: the figures are those of lm-eval's own model class for transformers, sample by sample."""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import datasets
import pytest
from lm_eval.api.instance import Instance
from lm_eval.evaluator import simple_evaluate
from lm_eval.models.huggingface import HFLM
from lm_eval.tasks import TaskManager
from peft import PeftModel
from tiny_runs import byte_tokenizer, recipe_values, write_base, write_rows
from transformers import AutoModelForCausalLM, PreTrainedModel

from qlora_train import Recipe, evaluate, train
from qlora_train.cli import main
from qlora_train.errors import BaseModelError
from qlora_train.generate.harness_model import HarnessModel
from qlora_train.generate.model_folder import find_model
from qlora_train.generate.task_evaluation import TaskEvaluation, evaluate_tasks

POSITIONS = 96
CHOICES = [
    {"question": "Is it so?", "choices": ["y", "n", "m"], "label": 0},  # a token each: read once
    {"question": "Ist es größer? 日本", "choices": ["ja, sehr", "nein", "n", "nei"], "label": 1},
    {"question": "", "choices": ["a", "bc"], "label": 1},
    {"question": "trailing space ", "choices": ["x", "yz"], "label": 0},
    {"question": "so long " * 20, "choices": ["one", "another"], "label": 1},  # loses its beginning
    {"question": "<bos>twice", "choices": ["1", "22"], "label": 1},
    {"question": "Q" * 70, "choices": ["z" * 40, "zz"], "label": 1},
]
TEXTS = [{"text": "A short text."}, {"text": "Ünïcode 🦙 \u2028 " * 14}, {"text": "b"}]
PROMPTS = [
    {"prompt": "Say it", "answer": "it"},
    {"prompt": "a much longer prompt than the other " * 4, "answer": "x"},
    {"prompt": "日本", "answer": "y"},
    {"prompt": "x", "answer": "y"},
]
TASKS = {
    "tiny_choice": {
        "output_type": "multiple_choice",
        "doc_to_text": "{{question}}",
        "doc_to_choice": "choices",
        "doc_to_target": "label",
        "target_delimiter": "",
        "num_fewshot": None,
        "metric_list": [{"metric": "acc"}, {"metric": "acc_norm"}],
    },
    "tiny_texts": {
        "output_type": "loglikelihood_rolling",
        "doc_to_text": "",
        "doc_to_target": "{{text}}",
        "metric_list": [{"metric": "word_perplexity"}],
    },
    "tiny_answers": {
        "output_type": "generate_until",
        "doc_to_text": "{{prompt}}",
        "doc_to_target": "{{answer}}",
        "generation_kwargs": {"until": ["||", "zz"], "max_gen_toks": 12},
        "metric_list": [{"metric": "exact_match"}],
    },
}


TRAINED = [
    {"prompt": "Is it so?", "completion": "y"},
    {"prompt": "Ist es größer? 日本", "completion": "nein"},
    {"prompt": "Say it", "completion": "it||more"},
    {"prompt": "x", "completion": "日本||"},
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """With tasks, their rows, a base, and a run on it in fp32."""
    folder = tmp_path_factory.mktemp("harness")
    for (name, task), rows in zip(TASKS.items(), (CHOICES, TEXTS, PROMPTS), strict=True):
        file = write_rows(folder / "rows" / f"{name}.jsonl", rows)
        write_task(folder / "tasks", name, file, task)
    base = write_base(folder / "base", max_position_embeddings=POSITIONS)
    recipe = recipe_values(
        base,
        write_rows(folder / "trained.jsonl", TRAINED),
        folder / "run",
        model={"quantization": "none"},
        data={"sequence_length": 64},
        training={"max_steps": 25, "learning_rate": 0.02, "gradient_accumulation_steps": 1},
    )
    train(Recipe.from_dict(recipe))
    return folder


def write_task(folder: Path, name: str, file: Path, task: dict[str, Any]) -> None:
    source = {"dataset_path": "json", "dataset_kwargs": {"data_files": {"test": str(file)}}}
    folder.mkdir(exist_ok=True)
    (folder / f"{name}.yaml").write_text(
        json.dumps({"task": name, "test_split": "test"} | source | task), encoding="utf-8"
    )


@pytest.fixture(autouse=True)
def tasks_of_the_test_alone(
    tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The thousands of tasks that come with lm-eval take seconds to list."""
    own = TaskManager.__init__

    def small(self: TaskManager, include_path: Path) -> None:
        own(self, include_path=include_path, include_defaults=False)

    monkeypatch.setattr(TaskManager, "__init__", small)
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path_factory.getbasetemp() / "datasets")


def theirs(model: PreTrainedModel, folder: Path, tasks: Sequence[str] = tuple(TASKS), **options: Any):
    """What lm-eval finds with transformers."""
    reference = HFLM(pretrained=model, tokenizer=byte_tokenizer(), batch_size=3)
    manager = TaskManager(folder / "tasks")
    found = simple_evaluate(reference, tasks=list(tasks), task_manager=manager, **options)
    assert found is not None
    return dict(found)


def assert_same(ours: TaskEvaluation, expected: dict[str, Any], name: str = "model") -> None:
    found = ours.results[name]
    for task, samples in expected["samples"].items():
        for mine, his in zip(found["samples"][task], samples, strict=True):
            assert mine["arguments"] == his["arguments"]
            if task == "tiny_answers":
                assert mine["resps"] == his["resps"]
                continue
            for [mine_of_choice], [his_of_choice] in zip(mine["resps"], his["resps"], strict=True):
                if task == "tiny_choice":
                    assert mine_of_choice[1] == his_of_choice[1], mine["arguments"]
                    mine_of_choice, his_of_choice = mine_of_choice[0], his_of_choice[0]
                assert mine_of_choice == pytest.approx(his_of_choice, rel=1e-5, abs=1e-5), mine["arguments"]
    for task, metrics in expected["results"].items():
        numbers = {metric: value for metric, value in metrics.items() if isinstance(value, float)}
        assert numbers and {metric: found["results"][task][metric] for metric in numbers} == pytest.approx(
            numbers, rel=1e-5
        )


def test_every_sample_is_scored_as_by_transformers(folder: Path) -> None:
    lines: list[str] = []
    ours = evaluate_tasks(
        folder / "run", list(TASKS), tasks_folder=folder / "tasks", with_base=True, log=lines.append
    )
    base = AutoModelForCausalLM.from_pretrained(folder / "base")
    assert_same(ours, theirs(base, folder), "base")
    trained = PeftModel.from_pretrained(base, str(folder / "run" / "adapter")).merge_and_unload()
    assert_same(ours, theirs(trained, folder), "trained")

    samples = ours.results["trained"]["samples"]
    of_choices = [greedy for row in samples["tiny_choice"] for [(_, greedy)] in row["resps"]]
    assert set(of_choices) == {True, False}
    assert [row["resps"] for row in samples["tiny_answers"]][::3] == [[["it"]], [["日本"]]]
    [line] = lines
    assert line.startswith("4 prompts, with their answers, are longer than the model's 96 positions")


def answers_with(
    folder: Path, copy: Path, generation_config: dict[str, Any], lines: list[str]
) -> TaskEvaluation:
    """Those of the run and of its base in a copy, where the base has this generation_config.json."""
    for name in ("base", "run"):
        shutil.copytree(folder / name, copy / name)
    (copy / "base" / "generation_config.json").write_text(json.dumps(generation_config))
    recipe = copy / "run" / "recipe.yaml"
    recipe.write_text(recipe.read_text("utf-8").replace(str(folder), str(copy)), encoding="utf-8")
    tasks = {"tasks": ["tiny_answers"], "tasks_folder": folder / "tasks"}
    return evaluate_tasks(copy / "run", **tasks, with_base=True, log=lines.append)


def test_greedy_answers_have_the_models_repetition_penalty(folder: Path, tmp_path: Path) -> None:
    lines: list[str] = []
    neutral = {"num_beams": 1, "bad_words_ids": None, "temperature": 0.7, "top_k": 20}
    ours = answers_with(folder, tmp_path / "penalty", {"repetition_penalty": 1.3} | neutral, lines)
    base = AutoModelForCausalLM.from_pretrained(tmp_path / "penalty" / "base")
    assert_same(ours, theirs(base, folder, ["tiny_answers"]), "base")
    assert not any("generation_config.json" in line for line in lines)

    unknown = {"no_repeat_ngram_size": 2, "min_length": 0, "suppress_tokens": [5]}
    plain = answers_with(folder, tmp_path / "other", unknown, lines)
    [line] = [line for line in lines if "generation_config.json" in line]
    assert "has no_repeat_ngram_size, suppress_tokens, which decoding here does not know" in line
    found, without = (of.results["base"]["samples"]["tiny_answers"] for of in (ours, plain))
    assert [row["resps"] for row in found] != [row["resps"] for row in without]

    for penalty in (0, "1.3"):
        damaged = {"repetition_penalty": penalty}
        with pytest.raises(BaseModelError, match="repetition_penalty is .*a number above 0"):
            answers_with(folder, tmp_path / f"damaged {penalty}", damaged, lines)


def test_examples_and_conversations_are_lm_evals(folder: Path) -> None:
    begun = TASKS["tiny_choice"] | {"gen_prefix": "So:", "fewshot_split": "test", "num_fewshot": 1}
    write_task(folder / "tasks", "tiny_begun", folder / "rows" / "tiny_choice.jsonl", begun)
    tasks = ["tiny_answers", "tiny_begun"]
    options: dict[str, Any] = {"limit": 3, "num_fewshot": 2, "apply_chat_template": True}
    ours = evaluate_tasks(folder / "run", tasks, tasks_folder=folder / "tasks", **options)
    base = AutoModelForCausalLM.from_pretrained(folder / "base")
    trained = PeftModel.from_pretrained(base, str(folder / "run" / "adapter")).merge_and_unload()
    assert_same(ours, theirs(trained, folder, tasks, **options), "trained")
    [prompt, _] = ours.results["trained"]["samples"]["tiny_begun"][0]["arguments"][0]
    assert prompt.startswith("<bos>u:") and prompt.endswith("a:So:") and prompt.count("So:") == 3


def test_an_answer_is_ended_by_a_text_in_its_last_tokens(folder: Path) -> None:
    def refuse() -> Iterator[Instance]:
        raise AssertionError("nothing is asked, so nothing is loaded")

    source = find_model(folder / "run")
    model = HarnessModel(source, refuse, batch_size=1, vram_bytes=None, log=print)
    ends = model._ends_in(["||", "日", "<eos>"])
    told = {text: ends(model.tok_encode(text)) for text in ("a||", "a|", "|a|", "", "日", "a<eos>")}
    assert told == {"a||": True, "a|": False, "|a|": False, "": False, "日": True, "a<eos>": True}
    assert not ends(model.tok_encode("日")[:-1])
    model.close()


def test_streamed_weights_have_the_same_scores(folder: Path, tmp_path: Path) -> None:
    streamed = tmp_path / "streamed"
    shutil.copytree(folder / "run", streamed)
    recipe = streamed / "recipe.yaml"
    text = recipe.read_text("utf-8")
    assert "weights: auto" in text
    recipe.write_text(text.replace("weights: auto", "weights: disk"), encoding="utf-8")
    lines: list[str] = []
    found = [
        evaluate_tasks(run, list(TASKS), tasks_folder=folder / "tasks", log=lines.append).figures
        for run in (folder / "run", streamed)
    ]
    assert found[0] == found[1] and any("layers 2 disk" in line for line in lines)


def evaluated(capsys: pytest.CaptureFixture[str], folder: Path, *arguments: str) -> tuple[int, str, str]:
    capsys.readouterr()
    code = main(["eval", str(folder / "run"), "--tasks-folder", str(folder / "tasks"), *arguments])
    found = capsys.readouterr()
    return code, found.out, found.err


def test_a_table_and_figures(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    asked = ("--tasks", "tiny_choice,tiny_texts", "--limit", "2", "--base")
    code, text, _ = evaluated(capsys, folder, *asked)
    lines = text.splitlines()
    assert code == 0 and lines[0] == "4 samples (lm-eval)" and lines[1].split() == ["trained", "base"]
    assert lines[2].startswith("tiny_choice acc ") and lines[2].count("±") == 2
    assert lines[4].startswith("tiny_texts word_perplexity ") and len(lines) == 5

    out = tmp_path / "samples.jsonl"
    code, text, _ = evaluated(capsys, folder, *asked, "--json", "--out", str(out))
    figures = json.loads(text)
    assert code == 0 and figures["trained"]["tiny_choice"]["num_samples"] == 2
    assert {"acc", "acc_stderr", "acc_norm"} <= set(figures["base"]["tiny_choice"])
    samples = [json.loads(line) for line in out.read_text("utf-8").split("\n")[:-1]]
    assert [(row["model"], row["task"], row["doc_id"]) for row in samples] == [
        (model, task, i)
        for model in ("trained", "base")
        for task in ("tiny_choice", "tiny_texts")
        for i in (0, 1)
    ]
    filters = [{"name": name, "filter": [{"function": name}]} for name in ("take_first", "lowercase")]
    filtered = TASKS["tiny_answers"] | {"filter_list": filters}
    write_task(folder / "tasks", "tiny_filtered", folder / "rows" / "tiny_answers.jsonl", filtered)
    code, text, _ = evaluated(capsys, folder, "--tasks", "tiny_filtered,tiny_choice", "--limit", "3")
    assert code == 0 and text.startswith("6 samples (lm-eval)\n")
    assert all(f"tiny_filtered exact_match,{each['name']} " in text for each in filters)

    again = evaluate(folder / "run", tasks=["tiny_choice"], tasks_folder=folder / "tasks", limit=2)
    assert again["trained"]["tiny_choice"]["acc"] == figures["trained"]["tiny_choice"]["acc"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--tasks", "tiny_choise"], "no task 'tiny_choise': did you mean tiny_choice"),
        (["--tasks", "tiny_lost"], "--tasks tiny_lost: cannot be read"),
        (["--tasks", "tiny_beams"], "generation_kwargs have num_beams, which decoding here does not know"),
        (["--tasks", "tiny_long"], "asks for 96 new tokens (max_gen_toks)"),
        (["--tasks", "tiny_empty"], "answer '' has 0 tokens of its own"),
        (["--tasks", "tiny_choice", "--data", "x"], "--data is not for tasks"),
        ([], "--tasks-folder goes with --tasks"),
    ],
    ids=str,
)
def test_what_is_refused(
    folder: Path, arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    lost, answers = folder / "nowhere.jsonl", folder / "rows" / "tiny_answers.jsonl"
    empty = write_rows(
        folder / "rows" / "empty.jsonl", [CHOICES[0], {"question": "a", "choices": ["b", ""], "label": 0}]
    )
    write_task(folder / "tasks", "tiny_lost", lost, TASKS["tiny_choice"])
    write_task(folder / "tasks", "tiny_empty", empty, TASKS["tiny_choice"])
    for name, options in (("tiny_beams", {"num_beams": 4}), ("tiny_long", {"max_gen_toks": POSITIONS})):
        write_task(folder / "tasks", name, answers, TASKS["tiny_answers"] | {"generation_kwargs": options})
    code, _, error = evaluated(capsys, folder, *arguments)
    assert code == 2 and message in error and "Traceback" not in error


def test_without_lm_eval(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    code, _, error = evaluated(capsys, folder, "--tasks", "tiny_choice")
    assert code == 2 and "lm_eval is not installed: pip install 'qlora-train[lm-eval]'" in error
