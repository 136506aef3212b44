"""From a run folder to a model that other tools load."""

from __future__ import annotations

from contextlib import nullcontext
from pathlib import Path

import torch

from qlora_train.data.prompts import stop_token_ids
from qlora_train.data.tokenizer import load_tokenizer, read_stop_ids
from qlora_train.device.description import CPU
from qlora_train.device.system import require_unix
from qlora_train.errors import ExportError, NotYetError, RunFolderError
from qlora_train.export.merge import MergeReport, merge, require_new_folder
from qlora_train.model.hub import resolve_base, resolve_dtype
from qlora_train.model.quantize import Packing
from qlora_train.recipe import load_recipe

__all__ = ["MergeReport", "export", "merge"]

DTYPES = {"float16": torch.float16, "bfloat16": torch.bfloat16, "float32": torch.float32}


def export(
    run: Path | str,
    to: str = "merged",
    base: str = "dequantized",
    dtype: str = "float16",
    out: Path | str | None = None,
) -> Path:
    """Write a finished run as merged weights and return their folder (default: `merged` inside the run).

    base: "dequantized" merges into the packed weights that training saw (from its cache, else they are packed
    again), "original" into the checkpoint's own. dtype: "float16", "bfloat16" or "float32". Needs no GPU and,
    up to 1.1 GB per tensor, less than 1.2 GB of memory.

    generation_config.json also lists the tokens that the chat template ends answers with; the template is the
    recipe's `model.chat_template`, where it names one. Raises
    `RunFolderError` (no run, or one without an adapter), `ExportError` and `BaseModelError` (see `merge`).
    """
    require_unix("export")
    run = Path(run)
    if to in ("adapter", "gguf") or base == "auto":
        raise NotYetError(
            f"export(to={to!r}, base={base!r}) is not there yet: use to='merged', base='dequantized'."
        )
    if to != "merged" or base not in ("original", "dequantized") or dtype not in DTYPES:
        raise ExportError(
            f"export(to={to!r}, base={base!r}, dtype={dtype!r}): to is 'merged', base is 'original' or"
            f" 'dequantized', dtype is one of {', '.join(DTYPES)}."
        )
    for needed, meaning in (("recipe.yaml", "not a run folder"), ("adapter", "the run has no adapter yet")):
        if not (run / needed).exists():
            raise RunFolderError(
                f"{run}: {meaning}: {needed} is missing. Give the folder that training wrote."
            )
    target = Path(out) if out is not None else run / "merged"
    require_new_folder(target)  # before the cache is read through
    recipe = load_recipe(run / "recipe.yaml")
    model = recipe.model
    folder = resolve_base(model.base, model.revision)[0]
    packing = Packing(model.quantization, model.double_quant) if base == "dequantized" else None
    tokenizer = load_tokenizer(str(folder), None, model.chat_template)
    end_ids = stop_token_ids(tokenizer, read_stop_ids(str(folder)), recipe.data)
    cached = None
    if packing is not None and packing.format != "none":
        from qlora_train.export.packed_layers import (
            cached_layers,  # transformers, which `merge` can do without
        )

        cached = cached_layers(folder, packing, resolve_dtype(model.compute_dtype, CPU))
    with cached or nullcontext():
        merged = merge(
            folder,
            run / "adapter",
            target,
            packing=packing,
            cached=cached,
            dtype=DTYPES[dtype],
            end_ids=end_ids,
        ).folder
    if model.chat_template is not None:  # the one that training wrote conversations with
        (merged / "chat_template.jinja").write_text(str(tokenizer.chat_template), encoding="utf-8")
    return merged
