"""The package as a library: in notebooks, from threads, with rows in memory."""

from __future__ import annotations

import json
import re
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import pytest
from datasets import Dataset
from tiny_runs import PROJECT, write_base

import qlora_train
from qlora_train.errors import DataError
from qlora_train.rows_file import save_rows

ROWS = [{"prompt": f"{n}:", "completion": f"{n}" * 2} for n in range(12)]


def recipe(tmp_path: Path, rows: str, held_out: str) -> qlora_train.Recipe:
    return qlora_train.Recipe.from_dict(
        {
            "model": {"base": str(write_base(tmp_path / "base")), "compute_dtype": "float32"},
            "data": {"train": rows, "eval": held_out, "sequence_length": 32},
            "training": {"output_dir": str(tmp_path / "run"), "max_steps": 2, "batch_size": 2},
        }
    )


def test_a_notebooks_way_in_a_thread(tmp_path: Path) -> None:
    """A thread that is not the main one may not handle signals; everything else is the same."""
    found: dict[str, Any] = {}

    def cells() -> None:
        rows = qlora_train.save_rows(ROWS, tmp_path / "rows.jsonl")
        held_out = qlora_train.save_rows(Dataset.from_list(ROWS[:4]), tmp_path / "held-out.jsonl")
        asked, steps = recipe(tmp_path, rows, held_out), []
        found["fits"] = qlora_train.plan(asked)["fits"]
        run = qlora_train.train(asked, on_step=lambda row: steps.append(row["step"]))
        found["steps"] = steps
        found["scores"] = qlora_train.evaluate(run.run_dir, with_base=True, max_new_tokens=4)
        found["answers"] = qlora_train.generate(run.run_dir, ["1:", "2:"], max_new_tokens=4, temperature=0.5)
        found["alone"] = qlora_train.generate(run.run_dir, ["1:"], max_new_tokens=4, temperature=0.5)
        found["eval_loss"] = run.eval_loss

    thread = threading.Thread(target=cells)
    thread.start()
    thread.join()
    assert found["fits"] is True and found["steps"] == [1, 2]
    assert found["scores"]["trained"]["loss"] == pytest.approx(found["eval_loss"], rel=1e-6)
    assert found["scores"]["trained"]["num_answers"] == 4 and "base" in found["scores"]
    assert len(found["answers"]) == 2 and found["answers"][0] == found["alone"][0]


def test_importing_the_package_imports_nothing_heavy() -> None:
    code = (
        "import sys, qlora_train\n"
        "print(sorted({'torch', 'transformers', 'datasets', 'numpy'} & set(sys.modules)))\n"
        "import qlora_train.generate.sampling, qlora_train.plan.words\n"
        "assert callable(qlora_train.plan) and callable(qlora_train.generate)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=PROJECT)
    assert (done.stdout, done.returncode) == ("[]\n", 0), done.stderr


def test_rows_are_written_as_they_are(tmp_path: Path) -> None:
    rows = [{"text": "漢\u2028x", "n": [1, None]}, {"text": ""}]
    file = Path(save_rows(rows, tmp_path / "deep" / "rows.jsonl"))
    assert [json.loads(line) for line in file.read_text(encoding="utf-8").split("\n")[:-1]] == rows


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([], "no rows"),
        (["text"], "row 1 is a str"),
        ([{"a": 1}, {"a": 1, "b": {1}}], "row 2, column 'b'"),
        ([{"a": float("nan")}], "row 1, column 'a'"),
    ],
)
def test_rows_that_json_cannot_hold(tmp_path: Path, rows: list[Any], message: str) -> None:
    file = tmp_path / "rows.jsonl"
    file.write_text("before\n")
    with pytest.raises(DataError, match=message):
        save_rows(rows, file)
    assert file.read_text() == "before\n" and list(tmp_path.iterdir()) == [file]
    with pytest.raises(DataError, match="name it .jsonl"):
        save_rows([{"a": 1}], tmp_path / "rows.csv")


def test_the_notebooks_cells_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """All of them, on the bundled base and for two steps; the lines that install are left out."""
    notebook = json.loads((PROJECT / "recipes" / "colab.ipynb").read_text(encoding="utf-8"))
    cells = ["".join(cell["source"]) for cell in notebook["cells"] if cell["cell_type"] == "code"]
    code = "\n".join(cells)
    for name, value in (
        ("BASE", str(PROJECT / "recipes" / "quickstart" / "base")),
        ("MAX_STEPS", 2),
        ("FOLDER", str(tmp_path)),
    ):
        code, number = re.subn(rf"^{name} = .*$", f"{name} = {value!r}", code, flags=re.MULTILINE)
        assert number == 1
    commands = re.findall(r"^!qlora-train (.*)$", code, flags=re.MULTILINE)
    assert commands == ["doctor"] and "%pip install" in code
    python = "\n".join(line for line in code.splitlines() if not line.startswith(("!", "%")))
    exec(compile(python, "colab.ipynb", "exec"), {})  # as a notebook does
    said = capsys.readouterr().out
    assert "\nfits\n" in f"\n{said}" and "exact match" in said and "merged" in said
    assert (tmp_path / "run" / "merged" / "model.safetensors").is_file()
