"""`qlora-train init`: the recipe that it writes is planned, previewed and trained as it is."""

from __future__ import annotations

import gzip
import io
import json
from pathlib import Path
from typing import Any

import pytest
from tiny_runs import reversal_rows, write_base, write_rows

from qlora_train import cli, load_recipe
from qlora_train.init import small_data
from qlora_train.init.new_recipe import GOALS
from qlora_train.plan import request as request_module
from qlora_train.recipe import Recipe

ROWS: dict[str, list[dict[str, Any]]] = {
    "chat": [
        {"messages": [{"role": "user", "content": f"{i}?"}, {"role": "assistant", "content": f"{i}!"}]}
        for i in range(60)
    ],
    "instruct": list(reversal_rows(60)),
    "completion": [{"text": f"line {i} of a text"} for i in range(60)],
}


@pytest.fixture(autouse=True)
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("QLORA_TRAIN_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(request_module, "find_card", lambda: None)
    monkeypatch.chdir(tmp_path)


def made(*argv: str) -> Recipe:
    """The recipe that `init` writes beside rows.jsonl."""
    assert cli.main(["init", "--data", "rows.jsonl", *argv]) == 0
    return load_recipe("rows.yaml")


@pytest.mark.parametrize("goal", GOALS)
def test_what_is_written_is_planned_previewed_and_trained(
    goal: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_base(tmp_path / "base", chat_template=None, max_position_embeddings=64)
    write_rows(tmp_path / "rows.jsonl", ROWS[goal])
    recipe = made("--base", "base", "training.max_steps=1", "training.batch_size=2")
    assert (recipe.lora.rank, recipe.training.max_steps) == (GOALS[goal].rank, 1)
    assert recipe.model.chat_template == ("plain" if goal == "chat" else None)
    assert recipe.data.sequence_length == 64
    written, said = (tmp_path / "rows.yaml").read_text(encoding="utf-8"), capsys.readouterr().out
    for line in said.splitlines()[1:]:
        assert f"# {line}" in written
    assert "# fits: " in written and f"for {goal}" in written and "arXiv:2305.14314" in written
    for command in ("plan", "preview", "train"):
        assert cli.main([command, "rows.yaml"]) == 0, capsys.readouterr().err
    assert (tmp_path / "runs" / "rows" / "adapter").is_dir()


def test_a_known_base_is_planned_for_a_card_with_what_is_said_of_it(tmp_path: Path) -> None:
    write_rows(tmp_path / "rows.jsonl", ROWS["chat"])
    (tmp_path / "rows.yaml").write_text("# mine\n", encoding="utf-8")
    argv = ["init", "--base", "meta-llama/Llama-3.2-1B", "--data", "rows.jsonl"]
    assert cli.main([*argv, "--card", "RTX 4060", "--ram", "32GiB"]) == 2
    assert (tmp_path / "rows.yaml").read_text(encoding="utf-8") == "# mine\n"
    assert cli.main([*argv, "--card", "RTX 4060", "--ram", "32GiB", "--out", "own.yaml"]) == 0
    text = (tmp_path / "own.yaml").read_text(encoding="utf-8")
    assert "RTX 4060 with 8 GiB" in text and "# fits:" in text and "qlora-train train own.yaml" in text
    recipe = load_recipe("own.yaml")
    assert recipe.model.chat_template is None and recipe.data.sequence_length == 2048
    assert recipe.training.learning_rate == 2e-4 and recipe.training.output_dir.endswith("runs/own")


@pytest.mark.parametrize(
    ("num_rows", "said", "expected"),
    [
        (300, [], (128, 5)),
        (3000, [], (128, 16)),
        (40, [], (128, 1)),
        (300, ["data.sequence_length=512"], (512, 1)),
        (300, ["training.batch_size=8"], (128, 8)),
        (300, ["training.epochs=2"], (128, 11)),
        (300, ["training.max_steps=5"], (128, 16)),
        (300, ["training.micro_batch_size=8"], (128, 16)),
        (300, ["training.micro_batch_size=3", "training.gradient_accumulation_steps=2"], (128, None)),
        (300, ["data.packing=false"], (128, 5)),
        (300, ["data.eval=longer.jsonl"], (320, 2)),
    ],
)
def test_small_data_make_steps_enough(
    tmp_path: Path, num_rows: int, said: list[str], expected: tuple[int, int | None]
) -> None:
    """Rows of 80 tokens: one fits a bin of 128, six a bin of 512."""
    write_base(tmp_path / "base", max_position_embeddings=4096)
    write_rows(tmp_path / "longer.jsonl", [{"prompt": "p" * 300, "completion": "x"}])
    prompts = (f"{i:04}" for i in range(num_rows))
    write_rows(tmp_path / "rows.jsonl", [{"prompt": text, "completion": "x" * 75} for text in prompts])
    recipe = made("--base", "base", *said)
    assert (recipe.data.sequence_length, recipe.training.batch_size) == expected
    assert cli.main(["preview", "rows.yaml", "-n", "1"]) == 0


@pytest.mark.parametrize(("num_rows", "share"), [(3, None), (9, None), (10, 0.1), (99, 0.1), (100, 0.02)])
def test_what_is_held_out_of_few_rows(tmp_path: Path, num_rows: int, share: float | None) -> None:
    write_base(tmp_path / "base")
    write_rows(tmp_path / "rows.jsonl", reversal_rows(num_rows))
    assert made("--base", "base", "training.max_steps=1").data.eval == share
    assert cli.main(["preview", "rows.yaml", "-n", "1"]) == 0


def test_the_longest_row_counts_where_it_is_held_out(tmp_path: Path) -> None:
    write_base(tmp_path / "base", max_position_embeddings=4096)
    for longest in range(10):
        rows = [{"prompt": f"{i}", "completion": "x" * (900 if i == longest else 9)} for i in range(10)]
        write_rows(tmp_path / "rows.jsonl", rows)
        (tmp_path / "rows.yaml").unlink(missing_ok=True)
        assert made("--base", "base").data.sequence_length == 960


@pytest.mark.parametrize("large", ["rows.jsonl", "held_out.jsonl", "held_out.jsonl.gz"])
def test_large_data_are_not_read(tmp_path: Path, large: str, monkeypatch: pytest.MonkeyPatch) -> None:
    write_base(tmp_path / "base", max_position_embeddings=4096)
    write_rows(tmp_path / "rows.jsonl", ROWS["instruct"])
    num_rows = small_data._SMALL_BYTES // 700 // (8 if large.endswith("gz") else 1)
    text = "".join(json.dumps({"prompt": f"{i}", "completion": "x" * 700}) + "\n" for i in range(num_rows))
    packed = gzip.compress(text.encode(), 0) if large.endswith("gz") else text.encode()
    (tmp_path / large).write_bytes(packed)
    monkeypatch.setattr(small_data, "build_dataset", lambda *_, **__: pytest.fail("they were read"))
    said = [] if large == "rows.jsonl" else [f"data.eval={large}"]
    recipe = made("--base", "base", *said)
    assert (recipe.data.sequence_length, recipe.training.batch_size) == (2048, 16)


def test_a_base_without_a_tokenizer_here_is_planned_all_the_same(tmp_path: Path) -> None:
    write_base(tmp_path / "base", max_position_embeddings=4096)
    (tmp_path / "base" / "tokenizer.json").unlink()
    write_rows(tmp_path / "rows.jsonl", ROWS["instruct"])
    assert made("--base", "base").data.sequence_length == 2048


def test_a_shorter_sequence_is_taken_where_the_longest_does_not_fit(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_rows(tmp_path / "rows.jsonl", ROWS["chat"])
    asked = []

    def plan(request: Any) -> dict[str, Any]:
        asked.append(request.recipe.data.sequence_length)
        fits = asked[-1] <= 512 and asked[0] != 4
        return PLAN | {
            "fits": fits,
            "num_parameters": 70e9,
            "problems": ["too much"],
            "floor": {},
            "advice": [],
        }

    monkeypatch.setattr("qlora_train.init.new_recipe.values_of", plan)
    recipe = made("--base", "meta-llama/Llama-3.3-70B")
    assert asked == [2048, 1024, 512] and recipe.data.sequence_length == 512
    assert recipe.training.learning_rate == 1e-4
    asked.clear()
    argv = ["init", "--base", "b", "--data", "rows.jsonl", "--out", "x.yaml", "data.sequence_length=4"]
    assert cli.main(argv) == 2 and asked == [4] and not (tmp_path / "x.yaml").exists()


PLAN = {
    "device": "cuda",
    "step_seconds": 1.0,
    "tokens_per_step": 1,
    "num_micro_batches": 1,
    "micro_batch_size": 1,
    "disk_bytes": 1,
    "disk_budget_bytes": 1,
    "peak_vram_bytes": 1,
    "vram_budget_bytes": 1,
    "peak_ram_bytes": 1,
    "ram_budget_bytes": 1,
    "seconds_per_million_tokens": 1.0,
    "evaluation_seconds_per_million_tokens": 1.0,
}


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--base", "b"], "--data is missing"),
        (["--data", "rows.jsonl"], "--base is missing"),
        (["--base", "./nosuch", "--data", "rows.jsonl"], "there is no folder ./nosuch"),
        (["--base", "b", "--data", "nosuch.jsonl"], "nosuch.jsonl does not exist"),
        (["--base", "b", "--data", "rows.jsonl", "--goal", "completion"], "say --goal chat"),
        (["--base", "b", "--data", "rows.jsonl", "lora.rnk=3"], "did you mean rank"),
        (["--base", "b", "--data", "rows.jsonl", "rank=3"], "is not section.key=value"),
    ],
)
def test_what_is_missing_or_wrong_is_said_and_nothing_is_written(
    argv: list[str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_rows(tmp_path / "rows.jsonl", ROWS["chat"])
    assert cli.main(["init", *argv]) == 2
    assert message in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["rows.jsonl"]


class Terminal(io.StringIO):
    """Standard input of a person who types these lines."""

    def isatty(self) -> bool:
        return True


def test_a_person_is_asked(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    write_base(tmp_path / "base")
    write_rows(tmp_path / "rows.jsonl", ROWS["instruct"])
    monkeypatch.setattr("sys.stdin", Terminal("base\nrows.jsonl\n"))
    assert cli.main(["init"]) == 0
    said = capsys.readouterr().out
    assert "Qwen/Qwen3-8B" in said and "base model" in said and load_recipe("rows.yaml").model.base
    monkeypatch.setattr("sys.stdin", Terminal(""))
    assert cli.main(["init"]) == 2
