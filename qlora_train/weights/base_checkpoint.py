"""Reads a base checkpoint and quantizes it, a block of rows at a time; the 16-bit model is never in memory.

Linears of a layer are quantized straight into the layer buffer. Weights that bitsandbytes has already
quantized are copied there as they are; those in FP8 are quantized like 16-bit ones (fp8_checkpoint.py),
experts in MXFP4 stay so (mxfp4_checkpoint.py).
Norms, biases, embedding and head are cast to the compute dtype, with no fp32 upcasts; a head that
bitsandbytes has quantized stays quantized (quantized_matrix.py). Peak: what is being filled, plus one block
of rows (64 MiB) and the quantizer's scratch (64 MiB), or the quantized head. (transformers' own loader first
materializes 16-bit weights.)
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from math import prod
from pathlib import Path

import torch
from torch import Tensor

from qlora_train.adapter.pissa import num_iterations
from qlora_train.errors import BaseModelError
from qlora_train.files.shards import MAX_READ_BYTES
from qlora_train.model.base import MetaModel
from qlora_train.model.base_folder import no_originals
from qlora_train.model.layer_buffer import LayerBufferLayout
from qlora_train.model.linear import FrozenLinear
from qlora_train.model.quantized_matrix import RowLayout
from qlora_train.quant.formats import MXFP4, UNQUANTIZED, Quantization
from qlora_train.quant.quantize import checked_rows, quantize
from qlora_train.quant.weight import QuantizedWeight
from qlora_train.weights.bitsandbytes_checkpoint import bitsandbytes_quantization, read_bitsandbytes_weight
from qlora_train.weights.checkpoint_names import RowPart, row_parts, tensors_of
from qlora_train.weights.mxfp4_checkpoint import Mxfp4Reader
from qlora_train.weights.principal_part import principal_part


class BaseCheckpoint:
    """The checkpoint in a folder, as the weights of a `MetaModel`; a context manager.

    tensors: parameter -> the tensors of the checkpoint whose rows, one after another, are its rows.
    parts: tensor of the checkpoint -> which rows of which layer's weight it holds, of all that are quantized.
    unchanged: tensors that a merged checkpoint has as they are: of other parts of the model than the language
    model, and those that its family keeps in fp32. factors: the principal parts that PiSSA took from the
    linears read so far.

    Raises `BaseModelError` for missing, surplus, misshapen or differently quantized tensors: on opening if
    the file headers show it, otherwise when the tensor is read.
    """

    def __init__(self, folder: Path, meta_model: MetaModel, reader: Mxfp4Reader | None = None) -> None:
        """reader: reads the tensors; None: a new one for the files in `folder`."""
        self.folder, self.meta_model = folder, meta_model
        self.reader = reader or Mxfp4Reader(folder)
        self.factors: dict[str, tuple[Tensor, Tensor]] = {}
        weights = {
            meta_model.parameter_name(layer, name): (layer, name)
            for layer in range(len(meta_model.layer_paths))
            for name, _ in meta_model.layer_shapes(layer).items()
        }
        parameters = {
            meta_model.embedding_name,
            meta_model.head_name,
            meta_model.own_head_name,
            *meta_model.plain_shapes,
            *weights,
        }
        self.tensors = tensors_of(meta_model.model, parameters, self.reader.names())
        self._computed = meta_model.stored_buffers - self.tensors.keys()
        """Buffers that this checkpoint does not have: as the family makes them."""
        self._tensors_of_text = {name for names in self.tensors.values() for name in names}
        self.parts: dict[str, RowPart] = {}
        for parameter, (layer, weight) in weights.items():
            self.parts |= self._parts_of(parameter, layer, weight)
        self._check_names()

    def __enter__(self) -> BaseCheckpoint:
        return self

    def __exit__(self, *exc: object) -> None:
        self.reader.close()

    def quantize_layer(self, layer: int, layout: LayerBufferLayout, layer_buffer: Tensor) -> None:
        """Quantize every linear of a layer into `layer_buffer` (uint8), on the device of that buffer."""
        for name, weight in layout.weights(layer_buffer).items():
            parameter = self.meta_model.parameter_name(layer, name)
            self._quantize_into(parameter, weight.shape, weight.quantization, weight.tensors)

    def plain(self, device: torch.device) -> dict[str, Tensor]:
        """Norms, biases, routers and stored buffers, mostly in the compute dtype."""
        tensors = {}
        for name, shape in self.meta_model.plain_shapes.items():
            value = torch.empty(shape, dtype=self.meta_model.plain_dtype(name), device=device)
            if name in self._computed:
                value.copy_(self.meta_model.model.get_buffer(name))
            elif not shape:
                value.copy_(self.reader.read(self.find(name)))
            else:
                for start, stop, rows in self._checked_rows(name, shape):
                    value[start:stop] = rows
            if not torch.isfinite(value).all():
                raise self._not_finite(name)
            tensors[name] = value
        return tensors

    @property
    def head_quantization(self) -> Quantization:
        """Quantization of the head's stored rows. A tied head is the embedding, which is never quantized."""
        meta_model = self.meta_model
        if meta_model.is_tied:
            return UNQUANTIZED
        stored = bitsandbytes_quantization(self.reader, self.find(meta_model.head_name))
        return UNQUANTIZED if stored is None else stored.by_row(meta_model.matrix_shape[1])

    def matrix_rows(self, name: str) -> Iterator[Tensor]:
        """Yield the embedding or the head as blocks of rows [n, D] in the compute dtype; each is valid until
        the next. A quantized head is yielded as it is stored, uint8 [n, row bytes]."""
        if name == self.meta_model.head_name and not self.meta_model.is_tied:
            quantized = read_bitsandbytes_weight(self.reader, self.find(name))
            if quantized is not None:
                yield from self._quantized_head_rows(quantized)
                return
        for _, _, rows in self._checked_rows(name, self.meta_model.matrix_shape):
            cast = rows.to(self.meta_model.dtype)
            if not torch.isfinite(cast).all():
                raise self._not_finite(name)
            yield cast

    def _quantized_head_rows(self, quantized: QuantizedWeight) -> Iterator[Tensor]:
        name, dtype = self.meta_model.head_name, self.meta_model.dtype
        self._check_shape(name, quantized.shape, self.meta_model.matrix_shape)
        num_rows, num_columns = quantized.shape
        row_format = RowLayout(quantized.quantization.by_row(num_columns), num_columns, dtype)
        step = max(1, MAX_READ_BYTES // (num_columns * dtype.itemsize))
        for start in range(0, num_rows, step):
            stop = min(start + step, num_rows)
            values = quantized.dequantize_rows(start, stop, dtype)
            if not torch.isfinite(values).all():
                raise self._not_finite(name)
            yield row_format.store(quantized, start, stop) if row_format.is_quantized else values

    def _not_finite(self, name: str) -> BaseModelError:
        return BaseModelError(
            f"{self.folder}: {name} holds values that are not finite, or that {self.meta_model.dtype} cannot "
            "hold. Use model.compute_dtype bfloat16, or repair the checkpoint."
        )

    def _checked_rows(self, name: str, shape: tuple[int, ...]) -> Iterator[tuple[int, int, Tensor]]:
        name = self.find(name)
        info = self.reader.info(name)
        if not info.dtype.is_floating_point:
            raise BaseModelError(
                f"{self.folder}: {name} is {info.dtype}: only linear layers can be quantized. Use a "
                "checkpoint that has it in 16 or 32 bits."
            )
        self._check_shape(name, info.shape, shape)
        return self.reader.row_blocks(name)

    def _quantize_into(
        self, name: str, shape: tuple[int, int], quantization: Quantization, tensors: dict[str, Tensor]
    ) -> None:
        names = self.tensors[name]
        if quantization == MXFP4:
            self._read_kept(names, shape, tensors)
            return
        already = read_bitsandbytes_weight(self.reader, names[0]) if len(names) == 1 else None
        if already is None:
            stored_shape = self.reader.info(names[0]).shape
            if len(names) == 1:
                self._check_shape(name, (prod(stored_shape[:-1]), *stored_shape[-1:]), shape)
            device = tensors["data"].device
            blocks = self.rows_to_freeze(name, device)
            quantize(blocks, shape, quantization, device, self.meta_model.dtype, name, out=tensors)
            return
        if name.removesuffix(".weight") in self.meta_model.principal_ranks:
            raise no_originals(f"{self.folder}: {name}")
        if already.quantization != quantization:
            raise BaseModelError(
                f"{name}: the checkpoint is already quantized as {_describe(already.quantization)}, the "
                f"recipe asks for {_describe(quantization)}. Set model.quantization and "
                "model.double_quant to what the checkpoint has."
            )
        self._check_shape(name, already.shape, shape)
        for key, tensor in already.tensors.items():
            tensors[key].copy_(tensor)

    def _read_kept(self, names: tuple[str, ...], shape: tuple[int, int], tensors: dict[str, Tensor]) -> None:
        if names[0] not in self.reader.experts:
            raise BaseModelError(
                f"{self.folder}: {names[0]} is not in MXFP4, as config.json has it (quantization_config). "
                "Check that config.json belongs to these weights."
            )
        num_experts, columns, rows = self.reader.info(names[0]).shape
        self._check_shape(names[0], (num_experts * rows, columns), shape)
        self.reader.read_kept(names[0], tensors)

    def _check_tied_head(self, head: str) -> None:
        """A tied head that is in the file as well must equal the embedding: otherwise transformers unties
        them."""
        embedding = self.find(self.meta_model.embedding_name)
        head_info, embedding_info = self.reader.info(head), self.reader.info(embedding)
        same = (head_info.shape, head_info.dtype) == (embedding_info.shape, embedding_info.dtype)
        pairs = zip(self.reader.row_blocks(head), self.reader.row_blocks(embedding), strict=False)
        if not same or not all(torch.equal(ours, theirs) for (_, _, ours), (_, _, theirs) in pairs):
            raise BaseModelError(
                f"{self.folder}: config.json ties head and embedding (tie_word_embeddings), but {head} "
                f"differs from {embedding}. Set tie_word_embeddings to false if the head is its own."
            )

    def _check_shape(self, name: str, stored_shape: tuple[int, ...], config_shape: tuple[int, ...]) -> None:
        if tuple(stored_shape) != tuple(config_shape):
            raise BaseModelError(
                f"{name} is {list(stored_shape)} in the checkpoint, config.json needs {list(config_shape)}"
            )

    def weight_rows(self, parameter: str, max_bytes: int = MAX_READ_BYTES) -> Iterator[Tensor]:
        """All rows of a layer's weight in blocks [n, in], whatever tensors they are in."""
        for name in self.tensors[parameter]:
            for _, _, rows in self.reader.row_blocks(name, max_bytes):
                yield rows.flatten(0, -2) if rows.dim() > 2 else rows

    def rows_to_freeze(
        self, parameter: str, device: torch.device, max_bytes: int = MAX_READ_BYTES
    ) -> Iterator[Tensor]:
        """All rows of a layer's weight, with PiSSA of what is left of it, which is computed on the device."""
        path = parameter.removesuffix(".weight")
        rows = self.weight_rows(parameter, max_bytes)
        if path not in self.meta_model.principal_ranks:
            yield from rows
            return
        assert self.meta_model.lora is not None
        linear = self.meta_model.model.get_submodule(path)
        assert isinstance(linear, FrozenLinear)
        weight, done = torch.empty(linear.out_features, linear.in_features, device=device), 0
        for block in checked_rows(rows, parameter):
            weight[done : done + len(block)] = block
            done += len(block)
        if torch.stack(weight.aminmax()).isfinite().all():  # else the quantizer refuses it
            rank, iterations = self.meta_model.principal_ranks[path], num_iterations(self.meta_model.lora)
            a, b = principal_part(weight, rank, iterations)
            self.factors[path] = (a.cpu(), b.cpu())
            weight.addmm_(b, a, alpha=-1)
        yield from weight.split(max(1, max_bytes // (4 * linear.in_features)))

    @property
    def own_head(self) -> str:
        """The tensor of a head that is not tied, or what it would be called."""
        name = self.meta_model.own_head_name
        return self.tensors.get(name, (name,))[0]

    def find(self, name: str) -> str:
        """The one tensor that holds a parameter. Raises `BaseModelError` if there is none."""
        if name not in self.tensors:
            raise BaseModelError(
                f"{self.folder}: the checkpoint has no tensor {name}, which config.json calls for"
            )
        return self.tensors[name][0]

    def parts_of(self, parameter: str) -> dict[str, RowPart]:
        """The entries of `parts` that make up one parameter of a layer."""
        return {name: self.parts[name] for name in self.tensors[parameter]}

    def _parts_of(self, parameter: str, layer: int, weight: str) -> dict[str, RowPart]:
        """Tensor -> rows of a layer's weight, which all of them together fill."""
        num_rows, columns = dict(self.meta_model.layer_shapes(layer).items())[weight]
        self.find(parameter)
        names = self.tensors[parameter]
        if len(names) == 1:
            return {names[0]: RowPart(layer, weight, 0, num_rows)}
        sizes = {name: self.reader.info(name).shape for name in names}
        parts = row_parts(layer, weight, names, {name: prod(size[:-1]) for name, size in sizes.items()})
        num_stored_rows = parts[names[-1]].stop
        if num_stored_rows != num_rows or any(size[-1:] != (columns,) for size in sizes.values()):
            raise BaseModelError(
                f"{self.folder}: {parameter} is in {len(names)} tensors with {num_stored_rows} rows "
                f"altogether (the first is {names[0]}, {list(sizes[names[0]])}), config.json needs "
                f"{num_rows} rows of {columns}. Is a part of the experts missing?"
            )
        return parts

    def _check_names(self) -> None:
        """Check that every parameter has a tensor and every weight is read; a surplus weight means that
        config.json belongs to another checkpoint."""
        meta_model = self.meta_model
        plain = meta_model.plain_shapes.keys() - self._computed
        wanted = [meta_model.embedding_name, meta_model.head_name, *plain]
        used = {self.find(name) for name in wanted} | self.parts.keys()
        if meta_model.is_tied:
            for head in self.tensors.get(meta_model.own_head_name, ()):
                used.add(head)
                self._check_tied_head(head)
        not_text = {n for n in self.reader.names() if n not in used and self._is_of_another_part(n)}
        always_fp32 = {self.find(n) for n in plain if meta_model.keeps_fp32(n)}
        self.unchanged = frozenset(not_text | always_fp32)
        surplus = [
            n
            for n in self.reader.names()
            if (n.endswith((".weight", ".bias")) or ".experts." in n) and n not in used and n not in not_text
        ]
        if surplus:
            raise BaseModelError(
                f"{self.folder}: the checkpoint holds {len(surplus)} weights that config.json has no place "
                f"for (such as {surplus[0]}). Check that config.json belongs to these weights."
            )

    def _is_of_another_part(self, name: str) -> bool:
        """Whether a tensor belongs to what is not the language model: vision, or a head that predicts further
        tokens. The family's class says which it ignores; in a checkpoint of several parts the text tower is
        the one called `language_model`."""
        ignored = self.meta_model.model._keys_to_ignore_on_load_unexpected or ()
        if any(re.search(pattern, name) for pattern in ignored) or name.startswith("mtp."):
            return True
        has_tower = any("language_model." in other for other in self._tensors_of_text)
        return has_tower and "language_model." not in name


def _describe(quantization: Quantization) -> str:
    double = " with double quantization" if quantization.double_quant else ""
    return f"{quantization.format}{double}" + (
        f", block size {quantization.block_size}" if quantization.is_4bit else ""
    )
