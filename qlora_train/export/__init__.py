"""From a run folder to a model that other tools load, with a receipt of how near it is (export_run.py).

Imports are made when `export` is called: they take seconds.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from qlora_train.device.system import require_unix

__all__ = ["export"]


def export(run: Path | str, *arguments: Any, **options: Any) -> Path:
    """See `export_run.export`."""
    require_unix("export")
    from qlora_train.export.export_run import export as export_run

    return export_run(run, *arguments, **options)
