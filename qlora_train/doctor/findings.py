"""The findings of `qlora-train doctor`, as functions of plain facts about the machine. Imports no torch."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass

from qlora_train.device.description import DeviceDescription
from qlora_train.plan.words import gib
from qlora_train.units import GIB

LOW_RAM_BYTES, LOW_DISK_BYTES, LOW_SHARED_BYTES = 2 * GIB, 5 * GIB, GIB
OTHERS_SHARE = 0.25
"""Share of device memory held by other programs from which on it is a problem; a desktop takes less."""
_INSTALL_TORCH = "install a build of torch for CUDA: https://pytorch.org/get-started/locally"


@dataclass(frozen=True)
class Finding:
    """One thing about the machine. advice: what to do. is_wrong: it must or should be changed."""

    text: str
    advice: str = ""
    is_wrong: bool = False


@dataclass(frozen=True)
class Library:
    """A required library. installed: its version, None if missing. wanted: such as ">=2.11"."""

    name: str
    wanted: str
    installed: str | None
    is_new_enough: bool


@dataclass(frozen=True)
class Folder:
    """A folder that a run writes to. purpose: for the user. free_bytes: of its disk. problem: why it cannot
    be written to. is_on_windows: it lies on a drive of Windows, seen from WSL."""

    purpose: str
    path: str
    free_bytes: int
    problem: str = ""
    is_on_windows: bool = False


@dataclass(frozen=True)
class Facts:
    """What is known of a machine. device: to compute on. cards: NVIDIA cards that nvidia-smi lists.
    driver_cuda: the newest CUDA that the driver supports. torch_cuda: the CUDA that torch is built for; None:
    without. torch_architectures: as torch.cuda.get_arch_list. torch_error: why torch cannot use the cards.
    bitsandbytes_library: its library for CUDA; None: it has loaded none. others_bytes: device memory that
    other programs hold. can_pin: None: not tried. shared_bytes: size of /dev/shm; None: there is none."""

    device: DeviceDescription
    torch_version: str
    cards: tuple[str, ...] = ()
    driver_cuda: tuple[int, int] | None = None
    torch_cuda: tuple[int, int] | None = None
    torch_architectures: tuple[str, ...] = ()
    torch_error: str = ""
    bitsandbytes_library: str | None = None
    has_compiler: bool = True
    has_python_headers: bool = True
    free_vram_bytes: int = 0
    others_bytes: int = 0
    can_pin: bool | None = None
    ram_bytes: int = 0
    free_ram_bytes: int = 0
    shared_bytes: int | None = None
    is_wsl: bool = False
    folders: tuple[Folder, ...] = ()
    libraries: tuple[Library, ...] = ()


def findings(facts: Facts) -> list[Finding]:
    """All findings, in the order in which they are printed."""
    device = facts.device
    graphics = [_no_gpu(facts)] if not device.is_accelerator else [*_gpu(facts), *_memory_of_gpu(facts)]
    if device.type == "cuda":
        graphics += _kernels(facts)
    return [*graphics, *_host(facts), *_folders(facts), *_libraries(facts)]


def _no_gpu(facts: Facts) -> Finding:
    if not facts.cards:
        return Finding("no GPU: training computes on the CPU")
    card = f"torch {facts.torch_version} does not use the {facts.cards[0]}"
    if facts.torch_cuda is None:
        return Finding(f"{card}: it is built without CUDA", _INSTALL_TORCH, is_wrong=True)
    driver = facts.driver_cuda
    if driver is not None and driver[0] < facts.torch_cuda[0]:  # within a major version an older one serves
        whose = "in Windows, which WSL uses" if facts.is_wsl else "on this machine"
        return Finding(
            f"{card}: it is built for CUDA {_version(facts.torch_cuda)}, the driver supports up to "
            + _version(driver),
            f"update NVIDIA's driver {whose}, or install torch for CUDA {driver[0]}",
            is_wrong=True,
        )
    advice = "see whether CUDA_VISIBLE_DEVICES hides it; a container needs docker run --gpus all"
    return Finding(f"{card}: {facts.torch_error or 'CUDA finds no device'}", advice, is_wrong=True)


def _gpu(facts: Facts) -> Iterator[Finding]:
    """The card, and whether driver and torch serve it."""
    device = facts.device
    major, minor = device.capability
    name = device.name or device.type
    yield Finding(f"{name}: {gib(device.memory_bytes)}, compute capability {major}.{minor}")
    if facts.torch_cuda is not None:
        driver = "unknown" if facts.driver_cuda is None else _version(facts.driver_cuda)
        built = f"torch {facts.torch_version} is built for CUDA {_version(facts.torch_cuda)}"
        yield Finding(f"{built}, the driver supports up to {driver}")
        if not _serves(facts.torch_architectures, device.capability):
            yield Finding(
                f"torch {facts.torch_version} has no kernels for compute capability {major}.{minor} (it has "
                f"{', '.join(facts.torch_architectures)})",
                _INSTALL_TORCH + "; a newer CUDA for a newer card, an older one for an older card",
                is_wrong=True,
            )
    if device.has_bfloat16:
        yield Finding("bfloat16 arithmetic")
    else:
        yield Finding("no bfloat16 arithmetic: float16 is used, with a loss scale")


def _serves(architectures: tuple[str, ...], capability: tuple[int, int]) -> bool:
    """Whether code for these architectures runs on a card: sm_86 on 8.6 and 8.9, compute_90 from 9.0 on."""
    for name in architectures:
        found = re.fullmatch(r"(sm|compute)_(\d+)(\d)", name)  # those with a letter run on one card only
        if found is None:
            continue
        built = (int(found[2]), int(found[3]))
        if built <= capability and (found[1] == "compute" or built[0] == capability[0]):
            return True
    return not architectures


def _memory_of_gpu(facts: Facts) -> Iterator[Finding]:
    total_bytes = facts.device.memory_bytes
    free = f"{gib(facts.free_vram_bytes)} of {gib(total_bytes)} VRAM free"
    if facts.others_bytes > OTHERS_SHARE * total_bytes:
        yield Finding(
            f"{free}: other programs hold {gib(facts.others_bytes)}",
            "nvidia-smi names them; browsers and games are the usual ones",
            is_wrong=True,
        )
    else:
        yield Finding(free)
    if facts.can_pin is not None:
        yield (
            Finding("host memory can be pinned")
            if facts.can_pin
            else Finding(
                "the system refuses to pin host memory: what streams or is offloaded is copied slower",
                "raise the limit on locked memory: ulimit -l unlimited, or docker run --ulimit memlock=-1",
                is_wrong=True,
            )
        )


def _kernels(facts: Facts) -> Iterator[Finding]:
    """Libraries whose kernels run on a card of the type "cuda"."""
    device = facts.device
    if facts.bitsandbytes_library is not None:
        yield Finding(f"bitsandbytes has loaded {facts.bitsandbytes_library}")
    else:
        yield Finding(
            "bitsandbytes has no library for this torch's CUDA: quantization and 8-bit optimizers fail",
            "pip install --upgrade bitsandbytes; python -m bitsandbytes says what it looks for",
            is_wrong=True,
        )
    if not device.has_triton:
        missing = [
            *(["a C compiler (apt install build-essential)"] if not facts.has_compiler else []),
            *(["Python's headers (apt install python3-dev)"] if not facts.has_python_headers else []),
        ]
        yield Finding(
            "Triton kernels do not run: slower library kernels take their place",
            f"Triton lacks {' and '.join(missing)}" if missing else "the warning above has the reason",
            is_wrong=True,
        )
    elif not device.has_liger:
        yield Finding(
            "liger-kernel is missing: norms and MLPs take longer",
            "pip install liger-kernel",
            is_wrong=True,
        )
    else:
        yield Finding("Triton and liger-kernel run")


def _host(facts: Facts) -> Iterator[Finding]:
    ram = f"{gib(facts.free_ram_bytes)} of {gib(facts.ram_bytes)} RAM free"
    if facts.is_wsl:
        advice = r"more for WSL (default: half): memory=... below [wsl2] in %UserProfile%\.wslconfig"
    else:
        advice = "close other programs" if facts.free_ram_bytes < LOW_RAM_BYTES else ""
    yield Finding(ram, advice, is_wrong=facts.free_ram_bytes < LOW_RAM_BYTES)
    if facts.shared_bytes is not None and len(facts.cards) > 1 and facts.shared_bytes < LOW_SHARED_BYTES:
        yield Finding(
            f"/dev/shm has {gib(facts.shared_bytes)}: too little for several GPUs in one run (NCCL)",
            "docker run --shm-size=2g, or --ipc=host",
            is_wrong=True,
        )


def _folders(facts: Facts) -> Iterator[Finding]:
    for folder in facts.folders:
        free = f"{folder.purpose}: {gib(folder.free_bytes)} free in {folder.path}"
        if folder.problem:
            yield Finding(f"{folder.purpose}: {folder.problem}", "name another folder", is_wrong=True)
        elif folder.is_on_windows:
            advice = "a folder of WSL's own, below your home folder there, is several times faster"
            yield Finding(f"{free}, on a drive of Windows", advice, is_wrong=True)
        elif folder.free_bytes < LOW_DISK_BYTES:
            yield Finding(free, "make room, or name another folder", is_wrong=True)
        else:
            yield Finding(free)


def _libraries(facts: Facts) -> Iterator[Finding]:
    if not facts.libraries:
        yield Finding("versions of libraries are unknown: qlora-train is not installed")
    old = [library for library in facts.libraries if not library.is_new_enough]
    for library in old:
        has = "is missing" if library.installed is None else f"{library.installed} is too old"
        advice = f"pip install '{library.name}{library.wanted}'"
        yield Finding(f"{library.name} {has}", advice, is_wrong=True)
    if facts.libraries and not old:
        shown = ("torch", "transformers", "bitsandbytes")
        versions = ", ".join(f"{lib.name} {lib.installed}" for lib in facts.libraries if lib.name in shown)
        yield Finding(f"{len(facts.libraries)} libraries are new enough ({versions})")


def _version(numbers: tuple[int, int]) -> str:
    return f"{numbers[0]}.{numbers[1]}"
