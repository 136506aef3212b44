"""Wheels for a machine without a network: what is in them, made smaller or not, still installs."""

from __future__ import annotations

import importlib.util
import subprocess
import sys
import zipfile
from pathlib import Path
from types import ModuleType

import pytest
from tiny_runs import PROJECT


@pytest.fixture(scope="module")
def script() -> ModuleType:
    spec = importlib.util.spec_from_file_location("offline_wheels", PROJECT / ".ci" / "offline_wheels.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def write_wheel(folder: Path, name: str, files: dict[str, str]) -> Path:
    """A wheel of version 1 with these files and the RECORD that belongs to them."""
    info = f"{name}-1.dist-info"
    files = files | {
        f"{info}/METADATA": f"Metadata-Version: 2.1\nName: {name}\nVersion: 1\n",
        f"{info}/WHEEL": "Wheel-Version: 1.0\nGenerator: test\nRoot-Is-Purelib: true\nTag: py3-none-any\n",
    }
    record = "".join(f"{file},,\n" for file in [*files, f"{info}/RECORD"])
    wheel = folder / f"{name}-1-py3-none-any.whl"
    with zipfile.ZipFile(wheel, "w") as archive:
        for file, content in (files | {f"{info}/RECORD": record}).items():
            archive.writestr(file, content)
    return wheel


def test_a_wheel_made_smaller_installs_and_lacks_what_was_left_out(
    script: ModuleType, tmp_path: Path
) -> None:
    libraries = [f"bitsandbytes/libbitsandbytes_{x}.so" for x in ("cpu", "cuda126", "cuda130", "rocm72")]
    files = {"bitsandbytes/__init__.py": "x = 5\n", **dict.fromkeys(libraries, "library" * 100)}
    wheel = write_wheel(tmp_path, "bitsandbytes", files)
    small = tmp_path / "small" / wheel.name
    small.parent.mkdir()
    script.copy_wheel(wheel, small, script.rules("cuda130")["bitsandbytes"])
    site = tmp_path / "site"
    pip = [
        sys.executable,
        "-m",
        "pip",
        "install",
        "--quiet",
        "--no-index",
        "--no-deps",
        "--target",
        str(site),
    ]
    subprocess.run([*pip, str(small)], check=True)
    installed = sorted(
        str(file.relative_to(site)) for file in site.rglob("*") if file.suffix in (".py", ".so")
    )
    assert installed == ["bitsandbytes/__init__.py", libraries[0], libraries[2]]
    record = next(site.rglob("RECORD")).read_text()
    assert libraries[0] in record and libraries[1] not in record
    assert (site / installed[0]).read_text() == "x = 5\n"


def test_unsloth_stays_without_its_web_application(script: ModuleType) -> None:
    keeps = script.rules("cuda130")["unsloth"]
    assert keeps("unsloth/models/llama.py") and keeps("unsloth-1.dist-info/RECORD")
    assert not keeps("studio/frontend/dist/index.js")


def test_our_packages_come_in_the_pinned_versions(script: ModuleType) -> None:
    pins = script.pinned_versions((PROJECT / "constraints.txt").read_text())
    assert all(script.normalised(package) in pins for package in script.OURS)
    assert pins["ruamel-yaml"] and pins["pydantic-core"]
    assert script.pinned_versions("# a comment\nA.b_c==1.2  # why\n") == {"a-b-c": "1.2"}
