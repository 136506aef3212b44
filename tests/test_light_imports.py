"""What is imported when: commands without torch, and mistakes that are found before it is imported."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest
from tiny_runs import PROJECT

HEAVY = {"torch", "transformers", "bitsandbytes", "numpy", "datasets", "accelerate", "pyarrow"}


def run_light(*argv: str, cwd: Path | None = None) -> subprocess.CompletedProcess[str]:
    """A command in a process of its own, which must have imported nothing heavy when it ends."""
    script = (
        "import sys\nfrom qlora_train.cli import main\ncode = 0\n"
        "try:\n    code = main(sys.argv[1:])\nexcept SystemExit:\n    pass\n"
        f"print(sorted({HEAVY} & set(sys.modules)), file=sys.stderr)\nsys.exit(code)\n"
    )
    command = [sys.executable, "-c", script, *argv]
    environment = os.environ | {"PYTHONPATH": str(PROJECT)}
    done = subprocess.run(command, capture_output=True, text=True, cwd=cwd or PROJECT, env=environment)
    assert done.stderr.splitlines()[-1] == "[]", done.stderr
    return done


@pytest.mark.parametrize(
    "argv", [["--help"], ["recipes"], ["recipes", "show", "gsm8k"], ["doctor", "--help"]]
)
def test_light_commands_import_nothing_heavy(argv: list[str]) -> None:
    assert run_light(*argv).returncode == 0


def test_bitsandbytes_says_nothing_about_a_kernel_that_is_not_used() -> None:
    name = "bitsandbytes.backends.cpu.ops"
    found = importlib.util.find_spec("bitsandbytes")
    assert found is not None and found.submodule_search_locations is not None
    module = Path(found.submodule_search_locations[0]).joinpath(*name.split(".")[1:]).with_suffix(".py")
    assert module.read_text(encoding="utf-8").count("logger.warning") == 1, "another line would be lost"
    script = f"import qlora_train, logging\nlogging.getLogger({name!r}).warning('about kernels')\n"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, cwd=PROJECT)
    assert (done.returncode, done.stderr) == (0, "")


@pytest.mark.parametrize(
    ("command", "change", "message"),
    [
        ("train", "model.base=./nosuch", "model.base: there is no folder ./nosuch"),
        ("preview", "model.base=/no/such", "model.base: there is no folder /no/such"),
        ("plan", "model.base=/no/such", "model.base: there is no folder /no/such"),
        ("train", "data.train=nosuch.jsonl", "The data file nosuch.jsonl does not exist"),
        ("preview", "data.train=[{path: a/b/c}]", "The data file a/b/c does not exist"),
        ("train", "data.eval=[nosuch.csv.gz]", "The data file nosuch.csv.gz does not exist"),
        ("train", "lora.init_from=nosuch", "lora.init_from: there is no folder nosuch"),
    ],
)
def test_a_wrong_path_is_refused_before_anything_heavy_is_imported(
    command: str, change: str, message: str, tmp_path: Path
) -> None:
    done = run_light(command, "quickstart", change, cwd=tmp_path)
    assert done.returncode == 2 and message in done.stderr
    assert list(tmp_path.iterdir()) == []
