"""Which operating system can run what.

`plan` and `preview` run anywhere. Whatever holds a base in memory or writes a model needs a Unix, and a GPU
needs Linux (WSL2 is one): pages that the kernel gives and a device's driver pins, reads past the page cache
at an offset, folders that are written through and renamed in one step.
"""

from __future__ import annotations

import platform
import sys

from qlora_train.errors import UserError


def is_wsl() -> bool:
    """Whether this Linux runs under Windows, whose driver the GPU is seen through."""
    return sys.platform == "linux" and "microsoft" in platform.release().lower()


def require_unix(command: str) -> None:
    """Raise `UserError` on native Windows. command: what was asked for, in the user's words."""
    if sys.platform == "win32":
        raise UserError(
            f"{command} needs Linux or WSL2, which sees the GPU as Linux does (in a terminal: wsl --install, "
            "then install and run qlora-train inside). On Windows itself only plan and preview work"
        )
