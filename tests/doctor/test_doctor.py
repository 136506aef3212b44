"""`qlora-train doctor`: each thing that can be wrong with a machine is found, alone, and says what to do."""

from __future__ import annotations

import re
from dataclasses import replace
from importlib import metadata
from pathlib import Path
from typing import Any

import pytest
from simulated_gpu.fixture import SimulatedGpu

from qlora_train import cli
from qlora_train.device.compute import THE_CPU, ComputeDevice
from qlora_train.device.description import CPU, planned_gpu
from qlora_train.doctor import command, gathering
from qlora_train.doctor.command import doctor_command, machine_lines
from qlora_train.doctor.findings import Facts, Folder, Library, findings
from qlora_train.doctor.gathering import gather_facts
from qlora_train.errors import QloraTrainError

GIB = 2**30
CARD = replace(planned_gpu("RTX 4090", None), memory_bytes=24 * GIB, index=0, has_triton=True, has_liger=True)
GOOD = Facts(
    device=CARD,
    torch_version="2.11.0",
    cards=("NVIDIA GeForce RTX 4090",),
    driver_cuda=(12, 4),  # older than torch's, within one major version
    torch_cuda=(12, 8),
    torch_architectures=("sm_75", "sm_86", "sm_90", "compute_90"),
    bitsandbytes_library="libbitsandbytes_cuda128.so",
    free_vram_bytes=22 * GIB,
    others_bytes=GIB,
    can_pin=True,
    ram_bytes=64 * GIB,
    free_ram_bytes=50 * GIB,
    shared_bytes=2**26,  # a container's; enough for one GPU
    folders=(Folder("cache", "/c", 100 * GIB), Folder("runs", "/r", 100 * GIB)),
    libraries=(Library("torch", ">=2.11", "2.11.0", True),),
)
ON_CPU = replace(GOOD, device=CPU)


@pytest.mark.parametrize("facts", [GOOD, replace(ON_CPU, cards=())], ids=["GPU", "CPU"])
def test_nothing_is_wrong_with_a_good_machine(facts: Facts) -> None:
    assert not [finding for finding in findings(facts) if finding.is_wrong]


def device(**changes: Any) -> dict[str, Any]:
    return {"device": replace(CARD, **changes)}


@pytest.mark.parametrize(
    ("facts", "changes", "text", "advice"),
    [
        (ON_CPU, {"torch_cuda": None}, "built without CUDA", "pytorch.org"),
        (ON_CPU, {"driver_cuda": (11, 4)}, "built for CUDA 12.8, the driver supports up to 11.4", "update"),
        (ON_CPU, {"driver_cuda": (11, 4), "is_wsl": True}, "up to 11.4", "driver in Windows"),
        (ON_CPU, {"torch_error": "no access"}, "no access", "CUDA_VISIBLE_DEVICES"),
        (GOOD, device(capability=(6, 1)), "no kernels for compute capability 6.1", "older one"),
        (
            GOOD,
            {"torch_architectures": ("sm_75", "sm_90a", "sm_120")},
            "no kernels for .* 8.9",
            "pytorch.org",
        ),
        (GOOD, {"others_bytes": 7 * GIB}, "other programs hold 7.00 GiB", "nvidia-smi"),
        (GOOD, {"can_pin": False}, "refuses to pin", "memlock"),
        (GOOD, {"bitsandbytes_library": None}, "bitsandbytes has no library", "upgrade bitsandbytes"),
        (
            GOOD,
            device(has_triton=False) | {"has_compiler": False},
            "Triton kernels do not",
            "build-essential",
        ),
        (GOOD, device(has_triton=False) | {"has_python_headers": False}, "Triton kernels", "python3-dev"),
        (GOOD, device(has_triton=False), "Triton kernels do not run", "warning"),
        (GOOD, device(has_liger=False), "liger-kernel is missing", "pip install liger-kernel"),
        (GOOD, {"free_ram_bytes": GIB}, "1.00 GiB of 64.00 GiB RAM free", "close"),
        (GOOD, {"free_ram_bytes": GIB, "is_wsl": True}, "RAM free", "wslconfig"),
        (GOOD, {"cards": ("A", "B")}, "/dev/shm", "shm-size"),
        (GOOD, {"folders": (Folder("runs", "/r", GIB),)}, "1.00 GiB free in /r", "make room"),
        (GOOD, {"folders": (Folder("runs", "/r", 9 * GIB, "is a file"),)}, "runs: is a file", "another"),
        (
            GOOD,
            {"folders": (Folder("runs", "/mnt/c/r", 99 * GIB, "", True),)},
            "drive of Windows",
            "WSL's own",
        ),
        (GOOD, {"libraries": (Library("a", ">=2", "1.0", False),)}, "a 1.0 is too old", "pip install 'a>=2'"),
        (GOOD, {"libraries": (Library("a", ">=2", None, False),)}, "a is missing", "pip install 'a>=2'"),
    ],
)
def test_what_is_wrong_is_found_alone_with_what_to_do(
    facts: Facts, changes: dict[str, Any], text: str, advice: str
) -> None:
    (wrong,) = [finding for finding in findings(replace(facts, **changes)) if finding.is_wrong]
    assert re.search(text, wrong.text) and advice in wrong.advice, wrong


def test_a_card_without_bfloat16_is_no_fault_and_is_told() -> None:
    old = replace(GOOD, **device(capability=(7, 5), has_bfloat16=False))
    found = findings(old)
    assert not any(finding.is_wrong for finding in found)
    assert any("float16 is used" in finding.text for finding in found)


def test_facts_of_this_machine_are_real(tmp_path: Path) -> None:
    facts = gather_facts(THE_CPU, tmp_path / "runs", tries_pinning=True)
    assert 0 < facts.free_ram_bytes < facts.ram_bytes and facts.can_pin is None
    assert [folder.problem for folder in facts.folders] == ["", ""]
    assert all(folder.free_bytes > 0 for folder in facts.folders)
    versions = {library.name: library.installed for library in facts.libraries}
    assert versions["torch"] == metadata.version("torch") and "liger-kernel" not in versions
    assert all(library.is_new_enough for library in facts.libraries)


def test_a_library_below_pyprojects_floor_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        metadata, "requires", lambda name: ["numpy>=999", "nosuch>=1", "peft>=9; extra == 'x'"]
    )
    libraries = gathering._libraries()
    assert [(lib.name, lib.wanted, lib.is_new_enough) for lib in libraries] == [
        ("numpy", ">=999", False),
        ("nosuch", ">=1", False),
    ]
    monkeypatch.setattr(metadata, "requires", _not_installed)
    assert gathering._libraries() == []


def _not_installed(name: str) -> list[str]:
    raise metadata.PackageNotFoundError(name)


def test_a_gpu_is_asked_for_memory_and_pinning(
    simulated_gpu: SimulatedGpu, sim: ComputeDevice, tmp_path: Path
) -> None:
    facts = gather_facts(sim, tmp_path, tries_pinning=True)
    assert facts.can_pin is True and facts.free_vram_bytes == sim.free_bytes > 0
    simulated_gpu.refuse_pinning()
    assert gather_facts(sim, tmp_path, tries_pinning=True).can_pin is False
    num_refused = simulated_gpu.num_pinning_refused
    assert gather_facts(sim, tmp_path, tries_pinning=False).can_pin is None
    assert simulated_gpu.num_pinning_refused == num_refused and simulated_gpu.pinned_bytes == 0


def test_the_command_prints_all_and_ends_with_1_for_what_is_wrong(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    monkeypatch.setattr(command, "gather_facts", lambda *_, **__: GOOD)
    doctor_command(tmp_path, THE_CPU)
    assert machine_lines(THE_CPU, tmp_path) == []
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == len(findings(GOOD)) and all(line.startswith("ok ") for line in lines)

    bad = replace(GOOD, can_pin=False, free_ram_bytes=GIB)
    monkeypatch.setattr(command, "gather_facts", lambda *_, **__: bad)
    with pytest.raises(QloraTrainError, match=f"2 of {len(findings(bad))}") as caught:
        doctor_command(tmp_path, THE_CPU)
    assert caught.value.exit_code == 1
    output = capsys.readouterr().out
    assert output.count("WRONG") == output.count("->") == 2
    (line,) = machine_lines(THE_CPU, tmp_path)
    assert "refuses to pin" in line and "(and 1 more)" in line and "qlora-train doctor" in line
    assert cli.main(["doctor"]) == 1
