"""Collect, in one small folder, the wheels that a GPU machine without a network may lack.

    python .ci/offline_wheels.py build/wheels [--python 3.12] [--cuda cuda130]

Such a machine is taken to have torch, triton, transformers, accelerate, peft, pytest and what those need.
Ours come in the versions of constraints.txt, peers in the newest ones that accept each other. Nothing is
resolved: the list names every package, so what the machine has stays as it is. Two wheels are made smaller:
bitsandbytes keeps the library for one CUDA version and the CPU's (43 MB to 4), unsloth loses its web
application (29 to 2). All are 18 MB.

Beside the wheels lies COMMIT, for a copy of the sources that has no git.
"""

from __future__ import annotations

import argparse
import re
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Callable
from pathlib import Path

PROJECT = Path(__file__).parent.parent
OURS = (
    "bitsandbytes",
    "pydantic",
    "pydantic_core",
    "annotated-types",
    "typing-inspection",
    "typing_extensions",
    "ruamel.yaml",
    "dill",
    "multiprocess",
    "liger_kernel",
)
PEERS = (
    "datasets>=4.6,<5",  # unsloth takes no newer one
    "trl>=0.29,<1.0",  # soup-cli takes no newer one
    "soup-cli",
    "plotext",
    "typer>=0.19,<0.28",
    "click>=8.1,<8.5",
    "unsloth",
    "unsloth_zoo",
    "tyro",
    "docstring-parser",
    "typeguard",
    "cut-cross-entropy",
    "msgspec",
    "structlog",
    "json5",
    "nest-asyncio",
)
GLIBC_MINORS = (39, 35, 34, 31, 28, 27, 24, 17, 12, 5)
"""Of manylinux tags; pip takes each only by its name."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--python", default="3.12", help="version on the GPU machine (default: 3.12)")
    parser.add_argument("--cuda", default="cuda130", help="of bitsandbytes' libraries (default: cuda130)")
    args = parser.parse_args()
    args.folder.mkdir(parents=True, exist_ok=True)
    for old in args.folder.glob("*.whl"):
        old.unlink()  # two versions of one package would stop the installation
    keeps = rules(args.cuda)
    with tempfile.TemporaryDirectory() as name:
        download(Path(name), args.python)
        for wheel in sorted(Path(name).glob("*.whl")):
            package = wheel.name.partition("-")[0]
            copy_wheel(wheel, args.folder / wheel.name, keeps.get(package, lambda member: True))
    (args.folder / "COMMIT").write_text(commit() + "\n")
    sizes = {wheel.name: wheel.stat().st_size for wheel in args.folder.glob("*.whl")}
    for wheel_name, num_bytes in sorted(sizes.items(), key=lambda item: -item[1]):
        print(f"{num_bytes / 1e6:8.2f} MB  {wheel_name}")
    print(f"{sum(sizes.values()) / 1e6:8.2f} MB in {args.folder}, for Python {args.python}, {args.cuda}")


def rules(cuda: str) -> dict[str, Callable[[str], bool]]:
    """Which members of a wheel stay, for those that are made smaller."""
    libraries = {f"libbitsandbytes_{name}.so" for name in (cuda, "cpu")}
    return {
        "bitsandbytes": lambda member: not member.endswith(".so") or Path(member).name in libraries,
        "unsloth": lambda member: not member.startswith("studio/"),
    }


def download(folder: Path, python: str) -> None:
    """Every package by itself, without what it asks for."""
    pins = pinned_versions((PROJECT / "constraints.txt").read_text())
    platforms = [f"manylinux_2_{minor}_x86_64" for minor in GLIBC_MINORS]
    platforms += ["manylinux2014_x86_64", "manylinux1_x86_64"]
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check"]
    command += ["--no-deps", "--only-binary=:all:", "--implementation", "cp", "--python-version", python]
    for platform in platforms:
        command += ["--platform", platform]
    wanted = [f"{package}=={pins[normalised(package)]}" for package in OURS]
    subprocess.run([*command, "--dest", str(folder), *wanted, *PEERS], check=True)


def pinned_versions(constraints: str) -> dict[str, str]:
    """Normalised name -> version."""
    lines = (line.partition("#")[0].strip() for line in constraints.splitlines())
    return {normalised(name): version for name, _, version in (x.partition("==") for x in lines) if version}


def normalised(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


def copy_wheel(source: Path, target: Path, keeps: Callable[[str], bool]) -> None:
    """The wheel without the members that do not stay, in its RECORD too."""
    with (
        zipfile.ZipFile(source) as old,
        zipfile.ZipFile(target, "w", zipfile.ZIP_DEFLATED, compresslevel=9) as new,
    ):
        for member in old.infolist():
            if not keeps(member.filename):
                continue
            content = old.read(member)
            if member.filename.endswith(".dist-info/RECORD"):
                lines = content.decode().splitlines(keepends=True)
                content = "".join(x for x in lines if keeps(x.partition(",")[0])).encode()
            new.writestr(member, content, zipfile.ZIP_DEFLATED)


def commit() -> str:
    """Of the checkout, marked where files differ from it."""

    def git(*arguments: str) -> str:
        command = ["git", "-C", str(PROJECT), *arguments]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()

    return git("rev-parse", "HEAD") + (" dirty" if git("status", "--porcelain") else "")


if __name__ == "__main__":
    main()
