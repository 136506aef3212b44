"""Peak resident memory of this process as the kernel counts it, Python and all imports included.

Imports no torch, so that programs without torch can measure too.
"""

from __future__ import annotations

import sys
from pathlib import Path


def process_peak_bytes() -> int:
    """Peak resident bytes of this process so far, or since `reset_process_peak`.

    VmHWM if the kernel has it (Linux); else `ru_maxrss`, which in a child process starts at the resident
    size of its parent.
    """
    for line in _read_lines(Path("/proc/self/status")):
        if line.startswith("VmHWM:"):
            return int(line.split()[1]) * 1024
    import resource  # not on Windows

    unit = 1 if sys.platform == "darwin" else 1024  # ru_maxrss is in bytes on macOS, in KiB on Linux
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def reset_process_peak() -> bool:
    """Reset `process_peak_bytes` to the current size; returns False if the kernel does not support it."""
    try:
        Path("/proc/self/clear_refs").write_text("5", encoding="ascii")
    except OSError:
        return False
    return True


def _read_lines(file: Path) -> list[str]:
    return file.read_text(encoding="ascii", errors="replace").splitlines() if file.is_file() else []
