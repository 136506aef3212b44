"""On what something was measured: hardware, versions, the project's commit. A figure without these is no
figure."""

from __future__ import annotations

import os
import platform
import shutil
import subprocess
from importlib import metadata
from pathlib import Path
from typing import Any

import psutil

from qlora_train import __version__

PACKAGES = (
    "torch",
    "transformers",
    "bitsandbytes",
    "accelerate",
    "triton",
    "peft",
    "trl",
    "unsloth",
    "soup-cli",
    "liger-kernel",
)
_GPU_FIELDS = ("name", "memory_mib", "driver", "compute_capability")
_GPU_QUERY = "--query-gpu=name,memory.total,driver_version,compute_cap"
RESULTS = "tests/benchmarks/results"
"""Figures kept in the repository: adding to them does not make a commit another program."""


def describe_machine() -> dict[str, Any]:
    """Plain JSON values: CPU, memory, GPU (None without one), versions (None where absent), commit.

    Imports no torch."""
    return {
        "cpu": _cpu_name(),
        "num_cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "num_threads": os.environ.get("OMP_NUM_THREADS"),
        "ram_bytes": psutil.virtual_memory().total,
        "system": platform.platform(),
        "gpu": _gpu(),
        "python": platform.python_version(),
        "versions": {name: version_of(name) for name in PACKAGES},
        "qlora_train": __version__,
        "commit": _commit(Path(__file__).parent),
    }


def version_of(package: str) -> str | None:
    """The version of an installed distribution, None where it is absent."""
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def _cpu_name() -> str:
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.is_file() else []
    names = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(names, platform.processor() or platform.machine())


def _gpu() -> dict[str, Any] | None:
    """The first GPU as the driver's tool describes it."""
    output = _output_of("nvidia-smi", _GPU_QUERY, "--format=csv,noheader,nounits")
    if not output:
        return None
    values = (value.strip() for value in output.partition("\n")[0].split(","))
    gpu: dict[str, Any] = dict(zip(_GPU_FIELDS, values, strict=True))
    return gpu | {"memory_mib": int(gpu["memory_mib"])}


def _commit(folder: Path) -> str | None:
    """The checkout's commit, with " dirty" where files differ from it; None for an installed package."""
    root = _output_of("git", "-C", str(folder), "rev-parse", "--show-toplevel")
    if not root or not (Path(root) / "tests" / "benchmarks").samefile(folder):
        return None  # installed into an environment that lies in somebody else's checkout
    commit = _output_of("git", "-C", root, "rev-parse", "HEAD")
    changed = _output_of("git", "-C", root, "status", "--porcelain", "--", ".", f":(exclude){RESULTS}")
    return f"{commit} dirty" if changed else commit


def _output_of(*command: str) -> str:
    """What a command prints, "" where it is not installed, fails or hangs."""
    if shutil.which(command[0]) is None:
        return ""
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=10, check=False)
    except subprocess.TimeoutExpired:
        return ""
    return done.stdout.strip() if done.returncode == 0 else ""
