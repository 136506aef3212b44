"""`export`: chooses base weights, dtype and adapter, merges, and measures the result before it gets its name.

Which base weights: LoRA parameters are trained against quantized weights. Merged onto those (`dequantized`)
they are exact up to the cast to 16 bits. But such weights lie on the quantization's grid: loading the folder
in 4 bits rounds small updates away, which gives the base again. Merged onto the original weights, the
quantization error is gone, and so is what the LoRA parameters learned to compensate for it, but quantizing
keeps updates as it does for any model. So `original` is the default if the original weights exist;
`dequantized` is marked in config.json, and the receipt shows both.

Which dtype: fp16 has three more bits of mantissa than bf16, so updates 8 times as small survive. Its range
ends at 65,504, which models trained in bf16 may exceed: fp16 is taken if the largest value in the receipt's
forward pass is below a quarter of that.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import ExitStack
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import torch
from transformers import PreTrainedTokenizerBase

from qlora_train.adapter.run_adapter import find_adapter
from qlora_train.adapter.trained_on import find_base, read_trained_on
from qlora_train.data.added_tokens import AddedTokens
from qlora_train.data.prompts import stop_token_ids
from qlora_train.data.tokenizer import read_stop_ids, tokenizer_of_run
from qlora_train.device.compute_dtype import COMPUTE_DTYPES, dtype_name, resolve_dtype
from qlora_train.device.description import CPU
from qlora_train.errors import DataError, ExportError
from qlora_train.export import BASES, LOADERS, QUANTS, SERVER
from qlora_train.export.adapter_folder import AdapterFolder
from qlora_train.export.companions import write_tokenizer
from qlora_train.export.held_out import held_out
from qlora_train.export.measure import Measure, Source
from qlora_train.export.merge import merge, require_new_folder
from qlora_train.export.model_card import BASE_CARD_FILE, CARD_FILE, model_card
from qlora_train.export.quantized_layers import cached_layers
from qlora_train.export.walked_model import HeldOut, LargestValue
from qlora_train.files.shards import ShardReader
from qlora_train.model.base_folder import check_base, read_plain_config
from qlora_train.quant.formats import Quantization
from qlora_train.recipe import Recipe, load_recipe
from qlora_train.weights.bitsandbytes_checkpoint import is_bitsandbytes_constant

if TYPE_CHECKING:
    from qlora_train.export.gguf.export_gguf import GgufExport

FP16_MARGIN = 0.25  # of fp16's range, for the largest value
RECEIPT_TOKENS = 2000


def write_export(
    run: Path,
    *,
    to: str,
    base: str | None,
    dtype: str,
    out: Path | str | None,
    checkpoint: str | None,
    receipt: int | Literal["auto"] | None,
    loaders: Sequence[str],
    quant: str | None,
    log: Callable[[str], None],
) -> Path:
    """Write the folder that `qlora_train.export` returns, which says what the arguments are."""
    _check_arguments(to, base, dtype, receipt, loaders, quant)
    num_tokens = RECEIPT_TOKENS if receipt == "auto" else receipt
    adapter = find_adapter(run, checkpoint, log)
    for_vllm = SERVER in loaders
    inside = {"gguf": f"gguf-{quant or 'f16'}", "adapter": f"adapter-{SERVER if for_vllm else 'peft'}"}
    target = Path(out) if out is not None else run / inside.get(to, to)
    require_new_folder(target)  # before anything is read through
    recipe = load_recipe(run / "recipe.yaml")
    folder, _ = find_base(recipe.model, run)
    tokenizer, added = tokenizer_of_run(recipe.model, str(folder))
    named = read_stop_ids(str(folder))
    check_base(folder)
    if (trained_on := read_trained_on(adapter)) is not None:
        trained_on.check_base(folder, adapter)
        trained_on.check_tokenizer(tokenizer, adapter)
    trained_quantization = Quantization(recipe.model.quantization, recipe.model.double_quant)
    quantization = _merged_onto(folder, base, trained_quantization)
    end_ids = stop_token_ids(tokenizer, named, recipe.data)
    if to == "adapter":
        only_template = [token for token in end_ids if token not in named]
        whole = AdapterFolder(recipe, folder, adapter, tokenizer, bool(added.ids), only_template)
        whole.write(target, for_vllm, log)
        return target
    gguf = (
        _gguf_export(recipe, folder, tokenizer, added, end_ids, quant or "f16", log) if to == "gguf" else None
    )
    documents = _held_out(recipe, tokenizer, named, num_tokens, log) if num_tokens is not None else None
    with ExitStack() as stack:
        cached = None
        if trained_quantization.is_quantized and (quantization is not None or documents is not None):
            dtype_of_run = resolve_dtype(recipe.model.compute_dtype, CPU)
            cached = cached_layers(folder, trained_quantization, dtype_of_run, recipe.lora)
            cached = stack.enter_context(cached) if cached is not None else None
        source = Source(
            folder, adapter, trained_quantization, quantization, recipe.model.compute_dtype, recipe.lora
        )
        measure = Measure(source, documents, cached, log) if documents is not None else None
        cached = cached if quantization is not None else None
        if gguf is not None:
            gguf.write(target, source, cached, measure)
            return target
        chosen = _choose_dtype(
            dtype, measure.largest if measure is not None else None, _own_dtype(folder), log
        )

        def complete(partial: Path) -> None:
            if added.ids:
                write_tokenizer(tokenizer, partial)
            if recipe.model.chat_template is not None:  # the one that training wrote conversations with
                (partial / "chat_template.jinja").write_text(str(tokenizer.chat_template), "utf-8")
            if measure is not None:
                models = measure.merged_models(partial, chosen, loaders)
                measure.receipt(models, "--dtype bfloat16").write(partial, log)
            if (partial / CARD_FILE).exists():
                (partial / CARD_FILE).rename(partial / BASE_CARD_FILE)
            usage = f"- load this folder as any model: `qlora-train generate {target.name} --prompt ...`."
            card = model_card(recipe, folder, "merged", usage, source.merged_onto)
            (partial / CARD_FILE).write_text(card, "utf-8")

        merge(
            folder,
            adapter,
            target,
            quantization=quantization,
            lora=recipe.lora,
            cached=cached,
            dtype=chosen,
            end_ids=end_ids,
            check=complete,
            log=log,
        )
    return target


def _check_arguments(
    to: str,
    base: str | None,
    dtype: str,
    receipt: int | str | None,
    loaders: Sequence[str],
    quant: str | None,
) -> None:
    if to == "adapter":
        if (base, dtype, receipt, quant) != (None, "auto", "auto", None) or set(loaders) - {SERVER}:
            raise ExportError(
                f"--to adapter writes the adapter as it was trained: it takes --for {SERVER}, and no other "
                "--for, no --base, --dtype, --receipt or --quant."
            )
        return
    if SERVER in loaders:
        raise ExportError(
            f"--for {SERVER} belongs to --to adapter: merged weights it serves as any model, without LoRA."
        )
    if to == "gguf" and (dtype != "auto" or loaders):
        raise ExportError("--dtype and --for belong to --to merged: what a GGUF file holds is --quant's.")
    if quant is not None and (to != "gguf" or quant not in QUANTS):
        raise ExportError(
            f"--quant {quant}: --to gguf writes {', '.join(QUANTS)}. llama.cpp's other formats it makes "
            "itself: export with --to gguf --quant f16, then "
            f"llama-quantize model-f16.gguf model-{quant}.gguf {quant.upper()}"
        )
    if to not in ("merged", "gguf") or base not in (None, *BASES) or dtype not in ("auto", *COMPUTE_DTYPES):
        raise ExportError(
            f"export(to={to!r}, base={base!r}, dtype={dtype!r}): to is 'merged', 'gguf' or 'adapter', "
            f"base is 'original' or 'dequantized', dtype is auto or one of {', '.join(COMPUTE_DTYPES)}."
        )
    if receipt is None and loaders:
        raise ExportError(
            f"--for {', '.join(loaders)}: loads what was written to measure it; needs a receipt."
        )
    if unknown := [name for name in loaders if name not in LOADERS]:
        raise ExportError(f"--for {', '.join(unknown)}: not one of {', '.join(LOADERS)}.")


def _gguf_export(
    recipe: Recipe,
    folder: Path,
    tokenizer: PreTrainedTokenizerBase,
    added: AddedTokens,
    end_ids: Sequence[int],
    quant: str,
    log: Callable[[str], None],
) -> GgufExport:
    if find_spec("gguf") is None:
        raise ExportError("--to gguf needs the gguf package: pip install 'gguf>=0.18'.")
    from qlora_train.export.gguf.export_gguf import GgufExport

    return GgufExport(recipe, folder, tokenizer, added, end_ids, quant, log)


def _merged_onto(folder: Path, base: str | None, trained: Quantization) -> Quantization | None:
    """The quantization of the weights to merge onto; None: the original weights. Raises `ExportError` where
    original weights are asked for and the base has none."""
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
    """The base's dtype: of its config, else of its first matrix."""
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
    """The dtype to write. largest: value in the receipt's forward pass; None: without receipt. own: the
    base's dtype. Raises `ExportError` where a requested float16 would overflow."""
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
