"""The command line: exit codes, one message on stderr, and no heavy import before it is needed."""

from __future__ import annotations

import io
import json
import os
import signal
import subprocess
import sys
import types
from pathlib import Path
from typing import Any

import pytest

import qlora_train
from qlora_train import cli
from qlora_train.cli import recipes
from qlora_train.errors import DataError, TrainingFailure
from qlora_train.generate.sampling import Sampling
from qlora_train.plan import request
from qlora_train.recipe import Recipe
from qlora_train.recipe.files import bundled_recipes
from qlora_train.terminal_text import show, tell

COMMANDS = (
    "train",
    "plan",
    "preview",
    "generate",
    "export",
    "recipes",
    "init",
    "doctor",
)
RECIPE = "model: {base: b}\ndata: {train: t}\n"


@pytest.fixture
def recipe_file(tmp_path: Path) -> Path:
    file = tmp_path / "recipe.yaml"
    file.write_text(RECIPE, encoding="utf-8")
    return file


def replace_module(monkeypatch: pytest.MonkeyPatch, name: str, function: Any, attribute: str) -> None:
    """Stand a module with one function in the place of a heavy one."""
    module = types.ModuleType(name)
    setattr(module, attribute, function)
    monkeypatch.setitem(sys.modules, name, module)


class Recorder:
    """A stand-in for what a command calls: remembers the call, then returns or raises."""

    def __init__(self, outcome: Any = None) -> None:
        self.outcome = outcome
        self.calls: list[tuple[tuple[Any, ...], dict[str, Any]]] = []

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        self.calls.append((args, kwargs))
        if isinstance(self.outcome, BaseException):
            raise self.outcome
        return self.outcome


@pytest.fixture
def train(monkeypatch: pytest.MonkeyPatch) -> Recorder:
    recorder = Recorder(types.SimpleNamespace(run_dir=Path("runs/x")))
    replace_module(monkeypatch, "qlora_train.train", recorder, "train")
    return recorder


def test_help_lists_every_command(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        cli.main(["--help"])
    listed = {
        line.split()[0]
        for line in capsys.readouterr().out.splitlines()
        if line.startswith("    ") and line[4] != " "
    }
    assert stop.value.code == 0
    assert set(COMMANDS) <= listed


@pytest.mark.parametrize("argv", [["bench"], ["export", "runs/x", "--to", "onnx"]])
def test_what_does_not_exist_is_an_unknown_word(argv: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        cli.main(argv)
    assert stop.value.code == 2
    output = capsys.readouterr()
    assert (
        output.out == ""
        and "invalid choice" in output.err
        and repr(argv[-1] if "--to" in argv else argv[0]) in output.err
    )


@pytest.mark.parametrize(
    "order",
    [["{}", "a=1", "--resume", "b=2"], ["--resume", "{}", "a=1", "b=2"], ["{}", "--resume", "a=1", "b=2"]],
)
def test_train_takes_overrides_before_and_after_options(
    order: list[str], recipe_file: Path, train: Recorder, capsys: pytest.CaptureFixture[str]
) -> None:
    words = {"{}": str(recipe_file), "a=1": "training.max_steps=7", "b=2": "lora.rank=3"}
    assert cli.main(["train", *(words.get(word, word) for word in order)]) == 0
    ((recipe,), options) = train.calls[0]
    assert isinstance(recipe, Recipe)
    assert (recipe.training.max_steps, recipe.lora.rank, options) == (
        7,
        3,
        {"resume": True, "use_cache": True},
    )
    assert "runs/x" in capsys.readouterr().out


def test_preview_calls_what_it_says(monkeypatch: pytest.MonkeyPatch, recipe_file: Path) -> None:
    preview = Recorder()
    replace_module(monkeypatch, "qlora_train.data.preview", preview, "preview")
    assert cli.main(["preview", str(recipe_file), "-n", "5", "data.packing=false"]) == 0
    ((recipe, num_rows), _) = preview.calls[0]
    assert (recipe.data.packing, num_rows) == (False, 5)


def test_plan_prints_json_for_a_card_that_is_not_here(
    recipe_file: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(request, "find_card", lambda: None)
    argv = ["plan", str(recipe_file), "model.base=TinyLlama/TinyLlama-1.1B-Chat-v1.0", "--json"]
    argv += ["training.micro_batch_size=4"]
    assert cli.main([*argv, "--vram", "24GiB", "training.max_steps=10"]) == 0
    plan = json.loads(capsys.readouterr().out)
    assert plan["fits"] and plan["device"] == "cuda" and plan["vram_budget_bytes"] == 24 * 2**30
    assert len(plan["weights"]) == len(plan["activations"]) == 22
    assert plan["seconds_to_the_end"] == pytest.approx(10 * plan["step_seconds"])
    assert cli.main([*argv, "--vram", "4GiB", "training.max_steps=10"]) == 0
    assert json.loads(capsys.readouterr().out)["peak_vram_bytes"] < 4 * 2**30 < plan["peak_vram_bytes"]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--vram", "600MiB", "model.base=Qwen/Qwen3-32B"], "the floor is made of"),
        (["--vram", "8", "model.base=Qwen/Qwen3-32B"], "memory.vram=8: must be auto or a size with its unit"),
        (["--vram", "8GiB"], "model.base: b is neither a folder"),
        (["--vram", "8GiB", "model.base=Qwen/Qwen3-32B", "lora.target_modules=[qproj]"], "matches no linear"),
    ],
)
def test_plan_refuses(
    words: list[str],
    message: str,
    recipe_file: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(request, "find_card", lambda: None)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    assert cli.main(["plan", str(recipe_file), *words]) == 2
    assert message in capsys.readouterr().err


def test_generate_calls_what_it_says(monkeypatch: pytest.MonkeyPatch) -> None:
    generate = Recorder()
    replace_module(monkeypatch, "qlora_train.generate.command", generate, "generate_command")
    command = ["generate", "runs/x", "--prompt", "a", "--prompt", "b", "--temperature", "0.5", "--raw"]
    assert cli.main(command) == 0
    assert cli.main([*command, "--vram", "1.5GiB"]) == 0
    options = {"system": None, "raw": True, "batch_size": 16, "as_json": False, "checkpoint": None}
    budgets, sampling = [None, 3 * 2**29], Sampling(128, 0.5)
    assert generate.calls == [
        (("runs/x", ["a", "b"], sampling), options | {"vram_bytes": b}) for b in budgets
    ]


@pytest.mark.parametrize(
    "options",
    [
        ["--top-k", "-1"],
        ["--min-p", "1"],
        ["--min-p", "nan"],
        ["--repetition-penalty", "0"],
        ["--repetition-penalty", "inf"],
        ["--temperature", "nan"],
        ["--batch-size", "0"],
    ],
)
def test_sampling_settings_have_bounds(options: list[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        cli.main(["generate", "runs/x", "--prompt", "a", *options])
    assert stop.value.code == 2


def test_export_calls_what_it_says(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    export = Recorder(Path("runs/x/merged"))
    replace_module(monkeypatch, "qlora_train.export", export, "export")
    assert cli.main(["export", "runs/x"]) == 0
    assert cli.main(["export", "runs/x", "--base", "original", "--dtype", "bfloat16", "--out", "y"]) == 0
    assert cli.main(["export", "runs/x", "--to", "gguf", "--quant", "q8_0"]) == 0
    common = {"checkpoint": None, "receipt": "auto", "loaders": [], "push_to_hub": None, "log": tell}
    merged = common | {"to": "merged", "quant": None}
    gguf = common | {"to": "gguf", "quant": "q8_0", "base": None, "dtype": "auto", "out": None}
    assert export.calls == [
        ((Path("runs/x"),), {"base": None, "dtype": "auto", "out": None} | merged),
        ((Path("runs/x"),), {"base": "original", "dtype": "bfloat16", "out": Path("y")} | merged),
        ((Path("runs/x"),), gguf),
    ]
    assert capsys.readouterr().out == "runs/x/merged\n" * 3


@pytest.mark.parametrize(
    ("outcome", "code", "message"),
    [
        (DataError("rows.jsonl:3: no column `q`"), 2, "qlora-train: rows.jsonl:3: no column `q`\n"),
        (TrainingFailure("gradients of layer 3"), 1, "qlora-train: gradients of layer 3\n"),
        (KeyboardInterrupt(), 130, "qlora-train: stopped by signal 2\n"),
        (MemoryError(), 1, "qlora-train: out of memory\n"),
        (
            type("OutOfMemoryError", (RuntimeError,), {})("CUDA: no 2 GiB\nmore"),
            1,
            "qlora-train: out of memory: CUDA: no 2 GiB\n",
        ),
        (RuntimeError("[enforce fail] DefaultCPUAllocator: no"), 1, "qlora-train: out of memory: [enf"),
        (OSError(28, "No space left on device", "x"), 1, "qlora-train: no space left on the disk: "),
    ],
)
def test_failures_become_one_message_and_a_code(
    outcome: BaseException,
    code: int,
    message: str,
    recipe_file: Path,
    train: Recorder,
    capsys: pytest.CaptureFixture[str],
) -> None:
    train.outcome = outcome
    assert cli.main(["train", str(recipe_file)]) == code
    output = capsys.readouterr()
    assert output.out == ""
    assert output.err.startswith(message) and "Traceback" not in output.err


def test_what_nobody_foresaw_keeps_its_traceback(recipe_file: Path, train: Recorder) -> None:
    for bug in (KeyError("a bug"), RuntimeError("a bug")):
        train.outcome = bug
        with pytest.raises(type(bug), match="a bug"):
            cli.main(["train", str(recipe_file)])


def test_sigterm_ends_with_143(recipe_file: Path, train: Recorder, monkeypatch: pytest.MonkeyPatch) -> None:
    before = signal.getsignal(signal.SIGTERM)
    replace_module(
        monkeypatch, "qlora_train.train", lambda *_, **__: os.kill(os.getpid(), signal.SIGTERM), "train"
    )
    assert cli.main(["train", str(recipe_file)]) == 143
    assert signal.getsignal(signal.SIGTERM) == before


def test_a_bad_recipe_lists_all_its_problems(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "bad.yaml"
    file.write_text(RECIPE + "lora: {rank: 0}\ntraning: {}\n", encoding="utf-8")
    assert cli.main(["train", str(file)]) == 2
    assert capsys.readouterr().err.splitlines() == [
        "qlora-train: several problems",
        f"{file}:3: lora.rank: must be 1 or more, got 0",
        f"{file}:4: traning: unknown key; did you mean training?",
    ]


@pytest.mark.parametrize(
    "argv",
    [
        [],
        ["trian"],
        ["train"],
        ["train", "gsm8k", "--fast"],
        ["train", "gsm8k", "epochs"],
        ["preview", "gsm8k", "-n", "0"],
        ["generate", "runs/x"],
        ["generate", "runs/x", "--prompt", "a", "--top-p", "1.5"],
        ["export", "runs/x", "--dtype", "float8"],
        ["recipes", "show"],
        ["recipes", "show", "gsm9k"],
    ],
)
def test_wrong_usage_ends_with_2(argv: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    try:
        code = cli.main(argv)
    except SystemExit as stop:
        code = int(stop.code or 0)
    assert code == 2
    assert capsys.readouterr().err


def test_recipes_lists_shows_and_copies(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["recipes"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert any(line.startswith("  gsm8k ") and "Grade-school maths" in line for line in lines)

    text = bundled_recipes()["gsm8k"].read_text(encoding="utf-8")
    assert cli.main(["recipes", "show", "gsm8k"]) == 0
    assert capsys.readouterr().out == text
    assert cli.main(["recipes", "copy", "gsm8k", str(tmp_path / "mine")]) == 0
    assert (tmp_path / "mine" / "gsm8k.yaml").read_text(encoding="utf-8") == text

    (tmp_path / "mine" / "gsm8k.yaml").write_text("# mine\n", encoding="utf-8")
    assert cli.main(["recipes", "copy", "gsm8k", str(tmp_path / "mine")]) == 2
    assert "already there" in capsys.readouterr().err
    assert (tmp_path / "mine" / "gsm8k.yaml").read_text(encoding="utf-8") == "# mine\n"


def test_a_recipe_is_not_copied_below_a_file(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "file").write_text("")
    for folder in (tmp_path / "file", tmp_path / "file" / "below"):
        assert cli.main(["recipes", "copy", "gsm8k", str(folder)]) == 2
        assert "a file is in the way" in capsys.readouterr().err


def test_a_recipe_with_its_own_data_is_copied_as_a_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    source = tmp_path / "bundled" / "own"
    (source / "__pycache__").mkdir(parents=True)
    (source / "recipe.yaml").write_text(RECIPE, encoding="utf-8")
    (source / "rows.jsonl").write_text("{}\n", encoding="utf-8")
    monkeypatch.setattr(recipes, "bundled_recipes", lambda: {"own": source / "recipe.yaml"})
    monkeypatch.chdir(tmp_path)
    assert cli.main(["recipes", "copy", "own"]) == 0
    assert capsys.readouterr().out == "own\n"
    assert sorted(path.name for path in (tmp_path / "own").iterdir()) == ["recipe.yaml", "rows.jsonl"]


def test_python_m_runs_the_command() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "qlora_train", "--version"], capture_output=True, text=True, cwd=_root()
    )
    assert (done.returncode, done.stdout) == (0, f"qlora-train {qlora_train.__version__}\n")


def test_output_into_a_closed_pipe_is_no_traceback() -> None:
    command = f"{sys.executable} -m qlora_train recipes show gsm8k | true"
    done = subprocess.run(command, shell=True, capture_output=True, text=True, cwd=_root())
    assert done.stderr == ""


@pytest.mark.parametrize("first", ["", ".train", ".export", ".train.run", ".export.export_run"])
def test_train_and_export_stay_functions_whatever_is_imported_first(first: str) -> None:
    script = f"""
import sys, qlora_train{first}
import qlora_train.train.run_folder, qlora_train.export.export_run
for name in ("train", "export"):
    function = getattr(qlora_train, name)
    print(callable(function), function is getattr(sys.modules[f"qlora_train.{{name}}"], name))
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, cwd=_root())
    assert (done.stdout, done.returncode) == ("True True\n" * 2, 0), done.stderr


def _root() -> Path:
    return Path(__file__).parent.parent


def test_a_terminal_is_shown_no_escape_sequences(monkeypatch: pytest.MonkeyPatch) -> None:
    for is_terminal, expected in (
        (True, "a\\x1b[2Jb\tc\n\\x9b\\u202e\u6f22"),
        (False, "a\x1b[2Jb\tc\n\x9b\u202e\u6f22"),
    ):
        stream = io.StringIO()
        monkeypatch.setattr(stream, "isatty", lambda answer=is_terminal: answer)
        show("a\x1b[2Jb\tc\n\x9b\u202e\u6f22", stream)
        assert stream.getvalue() == expected
