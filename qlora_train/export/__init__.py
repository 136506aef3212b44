"""Exports a run as merged weights or a GGUF file, which other tools load, with a receipt that measures the
difference from the trained model, or as an adapter (export_run.py), and uploads it (hub_upload.py).

Heavy libraries are imported when `export` is called, as importing them takes seconds.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from qlora_train.device.system import require_unix

__all__ = ["BASES", "LOADERS", "QUANTS", "SERVER", "export"]

QUANTS = ("f32", "f16", "bf16", "q8_0", "q5_1", "q5_0", "q4_1", "q4_0")
"""What matrices of a GGUF file may be written in."""
BASES = ("original", "dequantized")
"""The weights that an adapter may be merged onto: see export_run.py."""
LOADERS = {
    "transformers": "loaded by transformers",
    "bnb-4bit": "loaded by transformers + bitsandbytes in 4 bits",
}
"""How the written folder may be loaded for the receipt, by name: see loaders.py."""

SERVER = "vllm"
"""The server that an adapter may be exported for: see vllm_rules.py."""


def export(run: Path | str, *arguments: Any, push_to_hub: str | None = None, **options: Any) -> Path:
    """See `export_run.export`. push_to_hub: USER/NAME of a model on the hub that the finished folder is
    uploaded as; a new one is private. Raises `ExportError` where it cannot be, before anything is read."""
    require_unix("export")
    log = options.get("log", lambda line: None)
    if push_to_hub is not None:
        from qlora_train.export.hub_upload import require_uploadable, upload

        require_uploadable(push_to_hub, log)
    from qlora_train.export.export_run import export as export_run

    folder = export_run(run, *arguments, **options)
    if push_to_hub is not None:
        log(f"on the hub: {upload(folder, push_to_hub)}")
    return folder
