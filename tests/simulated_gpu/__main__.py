"""A program in a process of its own, on the simulated GPU: `python -m simulated_gpu [options] MODULE
ARGUMENTS`.

    python -m simulated_gpu --report seen.json qlora_train train recipe.yaml

runs what `python -m qlora_train train recipe.yaml` runs. It also serves `torch.distributed.run -m`, a device
per rank. Ends with the program's own code, or with 3 if that was 0 and hazards were found.
"""

from __future__ import annotations

import argparse
import json
import runpy
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from simulated_gpu.allocator import MIB
from simulated_gpu.fixture import SimulatedGpu, switched_on
from simulated_gpu.host_reads import Counts

HAZARDS_FOUND = 3


def main(arguments: Sequence[str]) -> int:
    asked = _parser().parse_args(arguments)
    sys.argv = [asked.module, *asked.arguments]
    with switched_on(total_bytes=int(asked.memory_mib * MIB)) as gpu:
        gpu.settings.capability = tuple(map(int, asked.capability.split(".")))  # type: ignore[assignment]
        if asked.refuse_pinning:
            gpu.refuse_pinning()
        code = _run(asked.module)
    if asked.report is not None:
        asked.report.write_text(json.dumps(report_of(gpu), indent=1), encoding="utf-8")
    for hazard in gpu.hazards:
        print(f"hazard: {hazard}", file=sys.stderr)
    return HAZARDS_FOUND if code == 0 and gpu.hazards else code


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="simulated_gpu")
    parser.add_argument("--capability", default="8.9")
    parser.add_argument("--memory-mib", type=float, default=8192, help="of each device")
    parser.add_argument("--refuse-pinning", action="store_true")
    parser.add_argument("--report", type=Path, help="write what was seen to this file, as JSON")
    parser.add_argument("module")
    parser.add_argument("arguments", nargs=argparse.REMAINDER)
    return parser


def _run(module: str) -> int:
    """The program's code, as the shell would see it."""
    try:
        runpy.run_module(module, run_name="__main__", alter_sys=True)
    except SystemExit as end:
        if isinstance(end.code, str):
            print(end.code, file=sys.stderr)
            return 1
        return end.code or 0
    return 0


def report_of(gpu: SimulatedGpu) -> dict[str, Any]:
    """What a test in another process asks of the handle, as JSON."""
    return {
        "hazards": gpu.hazards,
        "num_operators": gpu.num_operators,
        "num_allocations": gpu.num_allocations,
        "live_bytes": gpu.live_bytes(),
        "peak_bytes": gpu.peak_bytes(),
        "reserved_bytes": gpu.reserved_bytes(),
        "pinned_bytes": gpu.pinned_bytes,
        "host_reads": _rows(gpu.host_reads.values),
        "waiting_copies": _rows(gpu.host_reads.copies),
        "synchronizations": _rows(gpu.host_reads.synchronizations),
    }


def _rows(counts: Counts) -> list[list[Any]]:
    """[what, "file:line", how often], most often first."""
    return [[what, place, number] for (what, place), number in counts.most_common()]


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
