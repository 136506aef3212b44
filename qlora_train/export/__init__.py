"""Exports a run as merged weights that other tools load, with a receipt that measures their difference from
the trained model (export_run.py).

Heavy libraries are imported when `export` is called, as importing them takes seconds.
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
