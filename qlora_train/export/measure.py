"""Measures a receipt: runs the trained model once, then each model that it is compared with."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from qlora_train.adapter.adapter_config import HEAD
from qlora_train.adapter.adapter_files import load_adapter, load_fitting
from qlora_train.adapter.pissa import as_trained
from qlora_train.device.compute_dtype import dtype_name, resolve_dtype
from qlora_train.errors import ExportError
from qlora_train.export import LOADERS
from qlora_train.export.loaders import load_and_run
from qlora_train.export.merge import MergedReader, MergedWeights
from qlora_train.export.quantized_layers import QuantizedLayers
from qlora_train.export.receipt import Figures, Receipt, compare
from qlora_train.export.walked_model import HeldOut, LargestValue, WalkedModel, walk_model
from qlora_train.kernels.on_device import find_device
from qlora_train.model.base import MetaModel, adaptable_names, empty_model, read_config
from qlora_train.model.decoder import matrix_paths
from qlora_train.quant.formats import UNQUANTIZED, Quantization
from qlora_train.recipe import LoraSection
from qlora_train.weights.base_checkpoint import BaseCheckpoint

if TYPE_CHECKING:
    from qlora_train.export.gguf.write import GgufReader  # of an optional library

NF4 = Quantization("nf4", double_quant=True)
CHEAP_BYTES = 4 * 10**9  # weights up to this size are also run in 4 bits, and merged onto the other base
FINE_QUANTS = ("f32", "f16", "bf16", "q8_0")
MERGED_ONTO, IN_4_BITS = "merged onto", "  the same, quantized to nf4 when loaded"
MUCH_CLOSER, NOTICEABLE_KL = 0.1, 5e-3  # above what q8_0 itself loses


@dataclass(frozen=True)
class Source:
    """The base and adapter of an export. trained_quantization: of the base while training. quantization: of
    the weights that are merged onto; None: the original ones. compute_dtype, lora: the run's."""

    base_folder: Path
    adapter: Path
    trained_quantization: Quantization
    quantization: Quantization | None
    compute_dtype: str
    lora: LoraSection

    @property
    def merged_onto(self) -> str:
        return "original" if self.quantization is None else "dequantized"


class Measure:
    """Compares models with the trained model, which the constructor runs on the documents. cached: the layers
    that training quantized; None: they are quantized again. log: called with lines about what takes time.

    On a CPU all arithmetic is fp32, so that only weights differ; on an accelerator each model computes in its
    own dtype.
    """

    def __init__(
        self, source: Source, documents: HeldOut, cached: QuantizedLayers | None, log: Callable[[str], None]
    ) -> None:
        self._source, self._documents, self._cached, self._log = source, documents, cached, log
        self._device = find_device()
        log(f"measuring on {len(documents.all_labels):,} supervised tokens {documents.source}")
        config = read_config(source.base_folder)
        linears, experts = adaptable_names(config)
        matrices = matrix_paths(empty_model(config, torch.float32))
        self._trained = walk_model(
            source.base_folder,
            documents,
            source.trained_quantization,
            self._arithmetic(resolve_dtype(source.compute_dtype, self._device.description)),
            self._device,
            fill=None if cached is None else cached.read_layer,
            adapter=as_trained(
                source.lora, load_fitting(source.adapter, [*linears, *experts, *matrices, HEAD])
            ),
            lora=source.lora,
        )

    @property
    def largest(self) -> LargestValue:
        """The largest absolute value in the trained model's forward pass."""
        return self._trained.largest

    def receipt(self, models: Iterable[tuple[str, WalkedModel]], remedy: str) -> Receipt:
        """The receipt of (name, model), the written model first. Raises `ExportError` where its logits are
        not finite. remedy: the option that gives it more range."""
        trained_loss = 0.0
        figures: list[Figures] = []
        for name, model in models:
            trained_loss, found = compare(self._trained, model, self._documents, name)
            if not figures and not found.is_finite:
                where = model.largest.where or "its head"
                raise ExportError(f"{name}: its logits are not finite ({where}). Export with {remedy}.")
            figures.append(found)
        num_tokens = len(self._documents.all_labels)
        remark = self._base_remark(figures)
        return Receipt(self._documents.source, num_tokens, trained_loss, self.largest, tuple(figures), remark)

    def _base_remark(self, figures: Sequence[Figures]) -> str | None:
        """What to say where the merge onto the other base is much closer to the trained model."""
        written, *others = [one for one in figures if one.model.startswith(MERGED_ONTO)]
        if not others or written.kl < NOTICEABLE_KL or others[0].kl > MUCH_CLOSER * written.kl:
            return None
        other = "dequantized" if self._source.quantization is None else "original"
        unless = ", unless it is to be loaded in 4 bits" if other == "dequantized" else ""
        return f"--base {other} would be closer to the trained model{unless}"

    def gguf_models(
        self, reader: GgufReader, quant: str, num_bytes: int
    ) -> Iterator[tuple[str, WalkedModel]]:
        """(name, model) for everything to compare with a GGUF file of num_bytes, which is the first, run in
        fp32. quant: of its matrices; the coarse ones keep too little for the base to matter."""
        folder, documents, fp32 = self._source.base_folder, self._documents, torch.float32
        written = walk_model(folder, documents, UNQUANTIZED, fp32, self._device, reader=reader)
        yield f"{MERGED_ONTO} {self._source.merged_onto} weights, {quant} (written)", written
        if quant in FINE_QUANTS and num_bytes <= CHEAP_BYTES:
            yield from self._onto_the_other_base(fp32, fp32, {UNQUANTIZED: f"before {quant} (not written)"})

    def merged_models(
        self, written: Path, dtype: torch.dtype, loaders: Sequence[str]
    ) -> Iterator[tuple[str, WalkedModel]]:
        """(name, model) for everything to compare with a folder written in `dtype`, which is the first."""
        source, arithmetic = self._source, self._arithmetic(dtype)
        name = f"{MERGED_ONTO} {source.merged_onto} weights, {dtype_name(dtype)} (written)"
        yield name, walk_model(written, self._documents, UNQUANTIZED, arithmetic, self._device)
        is_cheap = sum(path.stat().st_size for path in written.glob("*.safetensors")) <= CHEAP_BYTES
        if is_cheap:
            model = walk_model(written, self._documents, NF4, arithmetic, self._device)
            yield IN_4_BITS, model
        for loader in loaders:
            decoder = self._trained.decoder
            model = load_and_run(loader, written, self._documents, decoder, self._device)
            yield f"  the same, {LOADERS[loader]}", model
        if is_cheap:
            forms = {UNQUANTIZED: f"{dtype_name(dtype)} (not written)", NF4: IN_4_BITS}
            yield from self._onto_the_other_base(dtype, arithmetic, forms)

    def _onto_the_other_base(
        self, dtype: torch.dtype, arithmetic: torch.dtype, forms: Mapping[Quantization, str]
    ) -> Iterator[tuple[str, WalkedModel]]:
        """(name, model) for a merge onto the weights that were not chosen, made in memory only. forms:
        the quantizations that it is loaded with, and the names; the first goes without."""
        source = self._source
        other, name = (
            (source.trained_quantization, "dequantized")
            if source.quantization is None
            else (None, "original")
        )
        meta_model = MetaModel(read_config(source.base_folder), arithmetic, source.lora)
        with BaseCheckpoint(source.base_folder, meta_model) as checkpoint:
            try:
                cached = None if other is None else self._cached
                weights = MergedWeights(checkpoint, other, cached, load_adapter(source.adapter))
            except ExportError:  # the original weights are not there
                return
            if not source.trained_quantization.is_quantized or weights.changes_head:
                return
            merged = MergedReader(source.base_folder, weights, dtype)
            for quantization, form in forms.items():
                model = walk_model(
                    source.base_folder, self._documents, quantization, arithmetic, self._device, reader=merged
                )
                yield form if quantization.is_quantized else f"{MERGED_ONTO} {name} weights, {form}", model

    def _arithmetic(self, dtype: torch.dtype) -> torch.dtype:
        """The dtype to compute in, for weights of a dtype."""
        return dtype if self._device.is_accelerator else torch.float32
