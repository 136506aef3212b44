"""A wheel alone, with no checkout beside it, has the recipes and the quickstart."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).parent.parent
RECIPES = REPOSITORY / "recipes"


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder that holds the package as `pip install` of its wheel leaves it."""
    pytest.importorskip("hatchling", reason="the wheel is built without downloading its build tool")
    folder = tmp_path_factory.mktemp("wheel")
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "--quiet"]
    wheel = [*pip, "wheel", str(REPOSITORY), "--no-deps", "--no-build-isolation", "-w", str(folder)]
    subprocess.run(wheel, check=True, cwd=folder)
    (file,) = folder.glob("qlora_train-*.whl")
    target = folder / "site"
    subprocess.run([*pip, "install", "--no-deps", "--target", str(target), str(file)], check=True, cwd=folder)
    return target


def run(installed: Path, *argv: str) -> subprocess.CompletedProcess[str]:
    environment = os.environ | {"PYTHONPATH": str(installed)}
    command = [sys.executable, "-m", "qlora_train", *argv]
    return subprocess.run(command, capture_output=True, text=True, cwd=installed.parent, env=environment)


def test_the_wheel_holds_every_file_of_the_recipes(installed: Path) -> None:
    wanted = {
        path.relative_to(RECIPES)
        for path in RECIPES.rglob("*")
        if path.is_file() and "__pycache__" not in path.parts
    }
    bundled = installed / "qlora_train" / "_recipes"
    assert {
        path.relative_to(bundled) for path in bundled.rglob("*") if path.suffix != ".pyc" and path.is_file()
    } == wanted
    assert all((bundled / path).read_bytes() == (RECIPES / path).read_bytes() for path in wanted)
    assert (installed / "qlora_train" / "py.typed").is_file()
    assert (installed / "qlora_train" / "report" / "page.html").is_file()


def test_the_wheel_has_no_benchmarks_and_no_tests(installed: Path) -> None:
    top = {path.name for path in installed.iterdir() if path.is_dir() and "." not in path.name}
    assert not top & {"tests", "benchmarks", "recipes"}
    assert not (installed / "qlora_train" / "bench").exists()


def test_the_installed_command_lists_and_shows_the_recipes(installed: Path) -> None:
    listed = run(installed, "recipes")
    assert (listed.returncode, listed.stderr) == (0, "")
    assert {"quickstart", "gsm8k", "e2e-restaurant", "qwen3-8b"} <= set(listed.stdout.split())
    shown = run(installed, "recipes", "show", "quickstart")
    assert shown.stdout == (RECIPES / "quickstart" / "recipe.yaml").read_text(encoding="utf-8")


def test_the_bundled_base_is_found_from_the_wheel(installed: Path) -> None:
    code = "from qlora_train import load_recipe; print(load_recipe('gsm8k').model.base)"
    environment = os.environ | {"PYTHONPATH": str(installed)}
    command = [sys.executable, "-c", code]
    done = subprocess.run(
        command, capture_output=True, text=True, cwd=installed.parent, env=environment, check=True
    )
    assert Path(done.stdout.strip()) == installed / "qlora_train" / "_recipes" / "quickstart" / "base"
