"""Resident memory of this process at its highest, as the kernel counts it: Python and all imports included.

Imports no torch: what asks for it may have none.
"""

from __future__ import annotations

import sys
from pathlib import Path


def process_peak_bytes() -> int:
    """Peak resident size of this process so far, or since `reset_process_peak`, as the kernel reports it.

    Linux: VmHWM. `ru_maxrss` is taken only where there is none: a child's starts at what its parent held
    before the child's program was loaded.
    """
    for line in _read_lines(Path("/proc/self/status")):
        if line.startswith("VmHWM:"):
            return int(line.split()[1]) * 1024
    import resource  # not on Windows

    unit = 1 if sys.platform == "darwin" else 1024  # ru_maxrss is in bytes on macOS, in KiB on Linux
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def reset_process_peak() -> bool:
    """Let `process_peak_bytes` begin at the present size; False where the kernel cannot."""
    try:
        Path("/proc/self/clear_refs").write_text("5", encoding="ascii")
    except OSError:
        return False
    return True


def _read_lines(file: Path) -> list[str]:
    return file.read_text(encoding="ascii", errors="replace").splitlines() if file.is_file() else []
