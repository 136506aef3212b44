"""Reading a base checkpoint into what a `Skeleton` needs, a few rows at a time; no 16-bit model is ever held.

Linears of a layer are packed straight into the layer's slab. Weights that bitsandbytes has already packed are
copied there as they are. Norms, biases, embedding and head are cast to the compute dtype, with no fp32
upcasts; a head that bitsandbytes has packed stays packed (packed_matrix.py). Peak: what is being filled, plus
one block of rows (64 MiB) and the quantiser's scratch (64 MiB), or the packed head. transformers' own loader
first materialises 16-bit weights.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor

from qlora_train.errors import BaseModelError
from qlora_train.model.base import Skeleton
from qlora_train.model.bitsandbytes_checkpoint import bitsandbytes_packing, read_bitsandbytes_weight
from qlora_train.model.packed_matrix import UNPACKED, RowFormat, packing_of_rows
from qlora_train.model.quantize import PackedWeight, Packing, pack
from qlora_train.model.shards import MAX_READ_BYTES, ShardReader
from qlora_train.model.slab import SlabLayout


class BaseCheckpoint:
    """The weights of a skeleton in a folder; a context manager.

    Raises `BaseModelError` for missing, surplus, misshapen or differently packed tensors: on opening what the
    headers tell, the rest when it is read.
    """

    def __init__(self, folder: Path, skeleton: Skeleton, reader: ShardReader | None = None) -> None:
        """reader: of the weights; None: those in the folder."""
        self._folder, self._skeleton = folder, skeleton
        self._reader = reader or ShardReader(folder)
        self._prefix = skeleton.model.base_model_prefix + "."
        self._check_names()

    def __enter__(self) -> BaseCheckpoint:
        return self

    def __exit__(self, *exc: object) -> None:
        self._reader.close()

    def pack_layer(self, layer: int, layout: SlabLayout, slab: Tensor) -> None:
        """Pack every linear of a layer into `slab` (uint8, on the device that is to do the packing)."""
        path = self._skeleton.layer_paths[layer]
        for name, weight in layout.weights(slab).items():
            self._pack_into(self._find(f"{path}.{name}.weight"), weight.shape, layout.packing, weight.tensors)

    def plain(self, device: torch.device) -> dict[str, Tensor]:
        """Norms and biases in the compute dtype."""
        tensors = {}
        for name, shape in self._skeleton.plain_shapes.items():
            value = torch.empty(shape, dtype=self._skeleton.dtype, device=device)
            for start, stop, rows in self._checked_rows(name, shape):
                value[start:stop] = rows
            if not torch.isfinite(value).all():
                raise self._not_finite(name)
            tensors[name] = value
        return tensors

    @property
    def head_packing(self) -> Packing:
        """How the head's rows are stored. A tied head is the embedding, which is never packed."""
        skeleton = self._skeleton
        if skeleton.is_tied:
            return UNPACKED
        found = bitsandbytes_packing(self._reader, self._find(skeleton.head_name))
        return UNPACKED if found is None else packing_of_rows(found, skeleton.matrix_shape[1])

    def matrix_rows(self, name: str) -> Iterator[Tensor]:
        """The embedding or the head, consecutive rows [n, D] in the compute dtype; each valid until the next.
        A head with a `head_packing` comes as it is stored, uint8 [n, row bytes]."""
        if name == self._skeleton.head_name and not self._skeleton.is_tied:
            packed = read_bitsandbytes_weight(self._reader, self._find(name))
            if packed is not None:
                yield from self._packed_head_rows(packed)
                return
        for _, _, rows in self._checked_rows(name, self._skeleton.matrix_shape):
            cast = rows.to(self._skeleton.dtype)
            if not torch.isfinite(cast).all():
                raise self._not_finite(name)
            yield cast

    def _packed_head_rows(self, packed: PackedWeight) -> Iterator[Tensor]:
        name, dtype = self._skeleton.head_name, self._skeleton.dtype
        self._check_shape(name, packed.shape, self._skeleton.matrix_shape)
        num_rows, num_columns = packed.shape
        row_format = RowFormat(packing_of_rows(packed.packing, num_columns), num_columns, dtype)
        step = max(1, MAX_READ_BYTES // (num_columns * dtype.itemsize))
        for start in range(0, num_rows, step):
            stop = min(start + step, num_rows)
            values = packed.unpack_rows(start, stop, dtype)
            if not torch.isfinite(values).all():
                raise self._not_finite(name)
            yield row_format.store(packed, start, stop) if row_format.is_packed else values

    def _not_finite(self, name: str) -> BaseModelError:
        return BaseModelError(
            f"{self._folder}: {name} holds values that are not finite, or that {self._skeleton.dtype} cannot "
            "hold. Use model.compute_dtype bfloat16, or repair the checkpoint."
        )

    def _checked_rows(self, name: str, shape: tuple[int, ...]) -> Iterator[tuple[int, int, Tensor]]:
        name = self._find(name)
        info = self._reader.info(name)
        if not info.dtype.is_floating_point:
            raise BaseModelError(
                f"{self._folder}: {name} is {info.dtype}: only linear layers can be packed. Use a checkpoint "
                "that has it in 16 or 32 bits."
            )
        self._check_shape(name, info.shape, shape)
        return self._reader.row_blocks(name)

    def _pack_into(
        self, name: str, shape: tuple[int, int], packing: Packing, tensors: dict[str, Tensor]
    ) -> None:
        already = read_bitsandbytes_weight(self._reader, name)
        if already is None:
            self._check_shape(name, self._reader.info(name).shape, shape)
            blocks = (rows for _, _, rows in self._reader.row_blocks(name))
            device = tensors["data"].device
            pack(blocks, shape, packing, device, self._skeleton.dtype, name, out=tensors)
            return
        if already.packing != packing:
            raise BaseModelError(
                f"{name}: the checkpoint is already packed as {_describe(already.packing)}, the "
                f"recipe asks for {_describe(packing)}. Set model.quantization and model.double_quant to "
                "what the checkpoint has."
            )
        self._check_shape(name, already.shape, shape)
        for key, tensor in already.tensors.items():
            tensors[key].copy_(tensor)

    def _check_tied_head(self) -> None:
        """A file may hold a tied head all the same, but not another one: transformers would then untie
        them."""
        head, embedding = "lm_head.weight", self._find(self._skeleton.embedding_name)
        if head not in self._reader:
            return
        same = self._reader.info(head).shape == self._reader.info(embedding).shape
        pairs = zip(self._reader.row_blocks(head), self._reader.row_blocks(embedding), strict=False)
        if not same or not all(torch.equal(ours, theirs) for (_, _, ours), (_, _, theirs) in pairs):
            raise BaseModelError(
                f"{self._folder}: config.json ties head and embedding (tie_word_embeddings), but {head} "
                f"differs from {embedding}. Set tie_word_embeddings to false if the head is its own."
            )

    def _check_shape(self, name: str, found: tuple[int, ...], wanted: tuple[int, ...]) -> None:
        if tuple(found) != tuple(wanted):
            raise BaseModelError(
                f"{name} is {list(found)} in the checkpoint, config.json needs {list(wanted)}"
            )

    def _find(self, name: str) -> str:
        """A parameter's name in the checkpoint: with or without the base model's prefix."""
        for candidate in (name, name.removeprefix(self._prefix)):
            if candidate in self._reader:
                return candidate
        raise BaseModelError(
            f"{self._folder}: the checkpoint has no tensor {name}, which config.json calls for"
        )

    def _check_names(self) -> None:
        """Every parameter has a tensor; a weight that nothing reads means a config that is not this
        checkpoint's."""
        skeleton = self._skeleton
        wanted = [skeleton.embedding_name, skeleton.head_name, *skeleton.plain_shapes]
        for i, path in enumerate(skeleton.layer_paths):
            wanted += [f"{path}.{name}.weight" for name in skeleton.linear_shapes(i)]
        used = {self._find(name) for name in wanted}
        if skeleton.is_tied:
            used.add("lm_head.weight")
            self._check_tied_head()
        surplus = [n for n in self._reader.names() if n.endswith((".weight", ".bias")) and n not in used]
        if surplus:
            raise BaseModelError(
                f"{self._folder}: the checkpoint holds {len(surplus)} weights that config.json has no place "
                f"for (such as {surplus[0]}). Check that config.json belongs to these weights."
            )


def _describe(packing: Packing) -> str:
    double = " with double quantisation" if packing.double_quant else ""
    return f"{packing.format}{double}" + (f", block size {packing.block_size}" if packing.is_4bit else "")
