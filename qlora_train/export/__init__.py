"""Exports a run as merged weights or a GGUF file, which other tools load, with a receipt that measures the
difference from the trained model (export_run.py).

Heavy libraries are imported when `export` is called, as importing them takes seconds.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from qlora_train.device.system import require_unix

__all__ = ["BASES", "LOADERS", "QUANTS", "export"]

QUANTS = ("f32", "f16", "bf16", "q8_0", "q5_1", "q5_0", "q4_1", "q4_0")
"""What matrices of a GGUF file may be written in."""
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
