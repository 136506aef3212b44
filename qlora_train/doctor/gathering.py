"""Gathers the facts about this machine for `findings`. Asks no network."""

from __future__ import annotations

import os
import re
import shutil
import sysconfig
from importlib import metadata
from pathlib import Path

import psutil
import torch
from bitsandbytes import cextension
from packaging.requirements import Requirement

from qlora_train.boundary import reason_of, require_creatable
from qlora_train.device import driver
from qlora_train.device.compute import ComputeDevice
from qlora_train.device.system import is_wsl
from qlora_train.doctor.findings import Facts, Folder, Library
from qlora_train.errors import UserError
from qlora_train.weights.cache_key import cache_root
from qlora_train.weights.host_memory import HostMemory

PINNED_BYTES = 2**20
_SHARED = Path("/dev/shm")


def gather_facts(device: ComputeDevice, output_dir: Path, *, tries_pinning: bool) -> Facts:
    """The facts about this machine. device: to compute on. tries_pinning: pin some memory for it."""
    has_gpu = device.is_accelerator
    cards = tuple(name for (name,) in driver.ask_nvidia_smi("name"))
    ram = psutil.virtual_memory()
    return Facts(
        device=device.description,
        torch_version=torch.__version__,
        cards=cards,
        driver_cuda=driver.cuda_version(),
        torch_cuda=_version(torch.version.cuda),
        torch_architectures=tuple(torch.cuda.get_arch_list()) if device.torch.type == "cuda" else (),
        torch_error=_error_of_cuda() if cards and not has_gpu else "",
        bitsandbytes_library=_bitsandbytes_library(),
        has_compiler=any(map(shutil.which, (os.environ.get("CC") or "cc", "gcc", "clang"))),
        has_python_headers=(Path(sysconfig.get_paths()["include"]) / "Python.h").is_file(),
        free_vram_bytes=device.free_bytes if has_gpu else 0,
        others_bytes=_others_bytes(device) if has_gpu else 0,
        can_pin=_can_pin(device) if has_gpu and tries_pinning else None,
        ram_bytes=ram.total,
        free_ram_bytes=ram.available,
        shared_bytes=shutil.disk_usage(_SHARED).total if _SHARED.is_dir() else None,
        is_wsl=is_wsl(),
        folders=(
            _folder("cache of quantized bases (QLORA_TRAIN_CACHE)", cache_root()),
            _folder("runs (training.output_dir)", output_dir),
        ),
        libraries=tuple(_libraries()),
    )


def _version(text: str | None) -> tuple[int, int] | None:
    """The numbers of "12.8"."""
    if text is None:
        return None
    major, minor = text.split(".")[:2]
    return int(major), int(minor)


def _error_of_cuda() -> str:
    """Why torch cannot start CUDA; empty if it can, or is built without."""
    if torch.version.cuda is None:
        return ""
    try:
        torch.cuda.init()
    except RuntimeError as error:
        return reason_of(error)
    return ""


def _bitsandbytes_library() -> str | None:
    """The file name of bitsandbytes' library for CUDA or ROCm; None: it has loaded none."""
    specs = cextension.get_cuda_specs() if cextension.lib.compiled_with_cuda else None
    return None if specs is None else cextension.get_cuda_bnb_library_path(specs).name


def _others_bytes(device: ComputeDevice) -> int:
    """Device memory of other programs, about: this one's context is not measured here."""
    own_bytes = device.reserved_bytes + device.description.context_bytes
    return max(0, device.total_bytes - device.free_bytes - own_bytes)


def _can_pin(device: ComputeDevice) -> bool:
    host = HostMemory(device)
    buffer = host.empty(PINNED_BYTES)
    return host.is_pinned(buffer)


def _folder(purpose: str, path: Path) -> Folder:
    path = path.absolute()
    existing = next(parent for parent in (path, *path.parents) if parent.exists())
    problem = ""
    try:
        require_creatable(path, UserError, "")
    except UserError as error:
        problem = str(error).strip()
    on_windows = is_wsl() and re.match(r"/mnt/[a-z](/|$)", str(existing.resolve())) is not None
    return Folder(purpose, str(path), shutil.disk_usage(existing).free, problem, on_windows)


def _libraries() -> list[Library]:
    """The libraries that this package requires; none if it is not installed."""
    try:
        required = metadata.requires("qlora-train") or []
    except metadata.PackageNotFoundError:
        return []
    always = [wanted for wanted in map(Requirement, required) if wanted.marker is None]
    return [_library(wanted) for wanted in always]


def _library(wanted: Requirement) -> Library:
    try:
        installed = metadata.version(wanted.name)
    except metadata.PackageNotFoundError:
        return Library(wanted.name, str(wanted.specifier), None, is_new_enough=False)
    fits = wanted.specifier.contains(installed, prereleases=True)
    return Library(wanted.name, str(wanted.specifier), installed, is_new_enough=fits)
