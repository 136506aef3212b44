"""Exports a run as merged weights that other tools load, with a receipt that measures their difference from
the trained model (export_run.py).

Heavy libraries are imported when `export` is called, as importing them takes seconds.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from qlora_train.device.system import require_unix

__all__ = ["BASES", "LOADERS", "export"]

BASES = ("original", "dequantized")
"""The weights that an adapter may be merged onto: see export_run.py."""
LOADERS = {
    "transformers": "loaded by transformers",
    "bnb-4bit": "loaded by transformers + bitsandbytes in 4 bits",
}
"""How the written folder may be loaded for the receipt, by name: see loaders.py."""


def export(run: Path | str, *arguments: Any, **options: Any) -> Path:
    """See `export_run.export`."""
    require_unix("export")
    from qlora_train.export.export_run import export as export_run

    return export_run(run, *arguments, **options)
