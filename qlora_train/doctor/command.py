"""`qlora-train doctor`, and the line that `train` logs where something is wrong with the machine."""

from __future__ import annotations

from pathlib import Path

from qlora_train.device.compute import ComputeDevice
from qlora_train.doctor.findings import findings
from qlora_train.doctor.gathering import gather_facts
from qlora_train.errors import QloraTrainError
from qlora_train.kernels.on_device import find_device


def doctor_command(output_dir: Path, device: ComputeDevice | None = None) -> None:
    """Print every finding about this machine, with what to do. device: None: the one that `train` would take.
    Raises `QloraTrainError` where something is wrong."""
    found = findings(gather_facts(device or find_device(), output_dir, tries_pinning=True))
    for finding in found:
        print(f"{'WRONG' if finding.is_wrong else 'ok':<6}{finding.text}")
        if finding.advice:
            print(f"      -> {finding.advice}")
    wrong = sum(finding.is_wrong for finding in found)
    if wrong:
        raise QloraTrainError(f"{wrong} of {len(found)} findings need a change")


def machine_lines(device: ComputeDevice, output_dir: Path) -> list[str]:
    """A line for the log if something is wrong with this machine; else nothing. Memory is not pinned for it:
    training says by itself what could not be pinned."""
    found = findings(gather_facts(device, output_dir, tries_pinning=False))
    wrong = [finding.text for finding in found if finding.is_wrong]
    if not wrong:
        return []
    more = f" (and {len(wrong) - 1} more)" if len(wrong) > 1 else ""
    return [f"{wrong[0]}{more}; qlora-train doctor says what to do"]
