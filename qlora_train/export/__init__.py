"""Exports a run as merged weights or a GGUF file, which other tools load, with a receipt that measures the
difference from the trained model, or as an adapter (export_run.py), and uploads it (hub_upload.py).

Heavy libraries are imported when `export` is called, as importing them takes seconds.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Literal

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


def export(
    run: Path | str,
    to: str = "merged",
    base: str | None = None,
    dtype: str = "auto",
    out: Path | str | None = None,
    *,
    checkpoint: str | None = None,
    receipt: int | Literal["auto"] | None = "auto",
    loaders: Sequence[str] = (),
    quant: str | None = None,
    push_to_hub: str | None = None,
    log: Callable[[str], None] = lambda line: None,
) -> Path:
    """Write a run as merged weights (to: "merged"), a GGUF file ("gguf") or an adapter ("adapter") and return
    the folder (default: `merged`, or such as `gguf-q8_0`, `adapter-peft`, inside the run).

    base: "dequantized" merges onto the quantized weights of training (from its cache, else they are quantized
    again), "original" onto the checkpoint's own; None: the original ones if they exist. dtype: "float16",
    "bfloat16", "float32" or "auto" (see export_run.py). checkpoint: "best", "last" or "step-N"; None: the
    finished adapter. receipt: number of supervised tokens to measure on ("auto": 2000; an adapter, which is
    the one that was trained, has none); None: no receipt. loaders: "transformers", "bnb-4bit": measure the
    written folder loaded by these, too; "vllm": refuse an adapter that vLLM refuses or takes for another one
    (vllm_rules.py). quant: what matrices of a GGUF file are written in, one of `QUANTS` (None: "f16").
    push_to_hub: USER/NAME of a model on the hub that the finished folder is uploaded as; a new one is
    private. log: called with lines of text. Needs no GPU; with tensors up to 1.1 GB, merging takes less than
    1.2 GB of memory, a receipt one layer more.

    generation_config.json also lists the tokens that the chat template ends answers with; the template is the
    recipe's `model.chat_template`, if given. Raises `RunFolderError` (no run, or one without an adapter),
    `ExportError` and `BaseModelError` (see `merge`), whatever it can before weights are read.
    """
    require_unix("export")
    if push_to_hub is not None:
        from qlora_train.export.hub_upload import require_uploadable, upload

        require_uploadable(push_to_hub, log)
    from qlora_train.export.export_run import write_export

    folder = write_export(
        Path(run),
        to=to,
        base=base,
        dtype=dtype,
        out=out,
        checkpoint=checkpoint,
        receipt=receipt,
        loaders=loaders,
        quant=quant,
        log=log,
    )
    if push_to_hub is not None:
        log(f"on the hub: {upload(folder, push_to_hub)}")
    return folder
