"""Which commands run on which operating system.

`plan` and `preview` run anywhere. Commands that load a base or write a model need a Unix, and a GPU needs
Linux (WSL2 included): for mapped pages that a device's driver can pin, reads at an offset past the page
cache, and folders that are synced and renamed atomically.
"""

from __future__ import annotations

import platform
import sys

from qlora_train.errors import UserError


def is_wsl() -> bool:
    """Whether this Linux is WSL, which uses the GPU through the driver of Windows."""
    return sys.platform == "linux" and "microsoft" in platform.release().lower()


def require_unix(command: str) -> None:
    """Raise `UserError` on native Windows. command: its name for the message."""
    if sys.platform == "win32":
        raise UserError(
            f"{command} needs Linux or WSL2, which sees the GPU as Linux does (in a terminal: wsl --install, "
            "then install and run qlora-train inside). On Windows itself only plan and preview work"
        )
