"""From a run folder to a model that other tools load, with a receipt of how near it is (export_run.py).

Imports are made when a function is called: they take seconds.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from qlora_train.device.system import require_unix
from qlora_train.export.merge import merge

__all__ = ["export", "merge"]


def export(run: Path | str, *arguments: Any, **options: Any) -> Path:
    """See `export_run.export`."""
    require_unix("export")
    from qlora_train.export.export_run import export as export_run

    return export_run(run, *arguments, **options)
