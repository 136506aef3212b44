"""`export`: which base, which dtype, which adapter; merge; measure what was written before it gets its name.

Onto which weights? Factors were trained against quantized weights, errors included. On top of those
(`dequantized`) they are exact, in 16 bits. But such weights lie on the quantization's grid, and whoever loads
the folder in 4 bits rounds everything between the grid's points away: small updates vanish, the result is the
base. On top of the original weights the quantization error goes, and so does what the factors learned to
make up for it, but quantizing leaves an update its chance, as for any model. So `original` is the default
where the original weights are there; the other one is marked in config.json, and the receipt shows both.

In which dtype? fp16 has three more bits of mantissa than bf16: updates 8 times as small survive. Its range
ends at 65,504, and families trained in bf16 may leave it: fp16 is taken where the largest value in the
receipt's forward pass stays below a quarter of that.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from pathlib import Path

import torch
from transformers import PreTrainedTokenizerBase

from qlora_train.adapter.trained_on import find_base, read_trained_on
from qlora_train.data.prompts import stop_token_ids
from qlora_train.data.tokenizer import load_tokenizer, read_stop_ids
from qlora_train.device.compute_dtype import COMPUTE_DTYPES, dtype_name, resolve_dtype
from qlora_train.device.description import CPU
from qlora_train.errors import DataError, ExportError
from qlora_train.export.held_out import held_out
from qlora_train.export.loaders import LOADERS
from qlora_train.export.measure import Measure, Source
from qlora_train.export.merge import merge, require_new_folder
from qlora_train.export.quantized_layers import cached_layers
from qlora_train.export.walked_model import HeldOut, LargestValue
from qlora_train.files.shards import ShardReader
from qlora_train.generate.run_adapter import find_adapter
from qlora_train.model.base_folder import check_base, read_plain_config
from qlora_train.quant.formats import Quantization
from qlora_train.recipe import Recipe, load_recipe
from qlora_train.weights.bitsandbytes_checkpoint import is_bitsandbytes_constant

FP16_MARGIN = 0.25  # of fp16's range, for the largest value
RECEIPT_TOKENS = 2000
RECEIPT_FILE = "receipt.json"


def export(
    run: Path | str,
    to: str = "merged",
    base: str | None = None,
    dtype: str = "auto",
    out: Path | str | None = None,
    *,
    checkpoint: str | None = None,
    receipt: int | None = RECEIPT_TOKENS,
    loaders: Sequence[str] = (),
    log: Callable[[str], None] = lambda line: None,
) -> Path:
    """Write a run as merged weights and return their folder (default: `merged` inside the run).

    base: "dequantized" merges into the quantized weights that training saw (from its cache, else they are
    quantized again), "original" into the checkpoint's own; None: the original ones, where they are there.
    dtype: "float16", "bfloat16", "float32" or "auto" (see the module docstring). checkpoint: "best", "last"
    or "step-N"; None: the finished adapter. receipt: supervised tokens it is measured on; None: no receipt.
    loaders: "transformers", "bnb-4bit": load what was written with these, too. say: told a line each. Needs
    no GPU; up to 1.1 GB per tensor, merging takes less than 1.2 GB of memory, and a receipt one layer more.

    generation_config.json also lists the tokens that the chat template ends answers with; the template is
    the recipe's `model.chat_template`, where it names one. Raises
    `RunFolderError` (no run, or one without an adapter), `ExportError` and `BaseModelError` (see `merge`).
    """
    _check_arguments(to, base, dtype, receipt, loaders)
    run = Path(run)
    adapter = find_adapter(run, checkpoint, log)
    target = Path(out) if out is not None else run / "merged"
    require_new_folder(target)  # before anything is read through
    recipe = load_recipe(run / "recipe.yaml")
    folder, _ = find_base(recipe.model, run)
    tokenizer = load_tokenizer(str(folder), None, recipe.model.chat_template)
    named = read_stop_ids(str(folder))
    check_base(folder)
    if (trained_on := read_trained_on(adapter)) is not None:
        trained_on.check_base(folder, adapter)
        trained_on.check_tokenizer(tokenizer, adapter)
    trained_quantization = Quantization(recipe.model.quantization, recipe.model.double_quant)
    quantization = _merged_onto(folder, base, trained_quantization)
    documents = _held_out(recipe, tokenizer, named, receipt, log) if receipt is not None else None
    with ExitStack() as stack:
        cached = None
        if trained_quantization.is_quantized and (quantization is not None or documents is not None):
            cached = cached_layers(
                folder, trained_quantization, resolve_dtype(recipe.model.compute_dtype, CPU)
            )
            cached = stack.enter_context(cached) if cached is not None else None
        measure = None
        if documents is not None:
            source = Source(folder, adapter, trained_quantization, quantization, recipe.model.compute_dtype)
            measure = Measure(source, documents, cached, log)
        chosen = _choose_dtype(
            dtype, measure.largest if measure is not None else None, _own_dtype(folder), log
        )

        def complete(partial: Path) -> None:
            if recipe.model.chat_template is not None:  # the one that training wrote conversations with
                (partial / "chat_template.jinja").write_text(str(tokenizer.chat_template), "utf-8")
            if measure is not None:
                found = measure.receipt(partial, chosen, loaders)
                for line in found.lines():
                    log(line)
                (partial / RECEIPT_FILE).write_text(json.dumps(found.to_dict(), indent=1) + "\n", "utf-8")

        merge(
            folder,
            adapter,
            target,
            quantization=quantization,
            cached=cached if quantization is not None else None,
            dtype=chosen,
            end_ids=stop_token_ids(tokenizer, named, recipe.data),
            check=complete,
            log=log,
        )
    return target


def _check_arguments(
    to: str, base: str | None, dtype: str, receipt: int | None, loaders: Sequence[str]
) -> None:
    if (
        to != "merged"
        or base not in (None, "original", "dequantized")
        or dtype not in ("auto", *COMPUTE_DTYPES)
    ):
        raise ExportError(
            f"export(to={to!r}, base={base!r}, dtype={dtype!r}): to is 'merged', base is 'original' or"
            f" 'dequantized', dtype is auto or one of {', '.join(COMPUTE_DTYPES)}."
        )
    if receipt is None and loaders:
        raise ExportError(
            f"--for {', '.join(loaders)}: loads what was written to measure it; needs a receipt."
        )
    if unknown := [name for name in loaders if name not in LOADERS]:
        raise ExportError(f"--for {', '.join(unknown)}: not one of {', '.join(LOADERS)}.")


def _merged_onto(folder: Path, base: str | None, trained: Quantization) -> Quantization | None:
    """How the weights to merge onto are quantized; None: the original ones."""
    with ShardReader(folder) as reader:
        is_quantized = any(is_bitsandbytes_constant(name) for name in reader.names())
    if base == "original" and is_quantized:
        raise ExportError(
            f"{folder}: the base is already quantized by bitsandbytes, its original weights are not there. "
            "Export with --base dequantized."
        )
    return trained if (base or ("dequantized" if is_quantized else "original")) == "dequantized" else None


def _held_out(
    recipe: Recipe,
    tokenizer: PreTrainedTokenizerBase,
    stop_ids: Sequence[int],
    num_tokens: int,
    log: Callable[[str], None],
) -> HeldOut | None:
    try:
        return held_out(recipe, tokenizer, stop_ids, num_tokens)
    except (DataError, OSError) as error:
        log(f"no receipt: the data of the run cannot be read ({str(error).splitlines()[0]})")
        return None


def _own_dtype(folder: Path) -> torch.dtype:
    """Of the base: as its config says, else as its first matrix is stored."""
    config = read_plain_config(folder)
    named = COMPUTE_DTYPES.get(str(config.get("dtype") or config.get("torch_dtype")).removeprefix("torch."))
    if named is not None:
        return named
    with ShardReader(folder) as reader:
        dtypes = [reader.info(name).dtype for name in reader.names() if len(reader.info(name).shape) == 2]
    return next((dtype for dtype in dtypes if dtype in COMPUTE_DTYPES.values()), torch.float16)


def _choose_dtype(
    dtype: str, largest: LargestValue | None, own: torch.dtype, log: Callable[[str], None]
) -> torch.dtype:
    """largest: in the receipt's forward pass; None: there was none. own: the base's."""
    end = torch.finfo(torch.float16).max
    if dtype != "auto":
        if dtype == "float16" and largest is not None and not largest.value <= end:
            raise ExportError(
                f"--dtype float16: {largest.where} reaches {largest.value:.4g}, and float16 ends at "
                f"{end:,.0f}: the merged model would answer with NaN. Export with --dtype bfloat16."
            )
        return COMPUTE_DTYPES[dtype]
    if largest is None:
        log(f"written in {dtype_name(own)}, the base's own (float16 is tried with a receipt only)")
        return own
    if largest.value < FP16_MARGIN * end:
        log(f"written in float16: the largest value inside is {largest.value:.4g}, at {largest.where}")
        return torch.float16
    chosen = torch.bfloat16 if own == torch.float16 and not largest.value <= end else own
    log(
        f"written in {dtype_name(chosen)}, not float16: {largest.where} reaches {largest.value:.4g}, and "
        f"float16 ends at {end:,.0f}"
    )
    return chosen
