"""What a run asks for, as numbers: everything but the execution plan that decides bytes and time.

Shape of the model, quantization, factors, tokens per micro-batch, optimizer. One `Workload` and one
`ExecutionPlan` give one prediction (planned_walk.py, time_model.py); the planner varies the plan.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import lru_cache

import torch

from qlora_train.adapter.lora_targets import choose_targets
from qlora_train.device.description import DeviceDescription
from qlora_train.model.quantized_matrix import RowLayout
from qlora_train.plan.host_budget import dtype_of
from qlora_train.plan.model_shape import ModelShape
from qlora_train.plan.split import Split, splits_of
from qlora_train.quant.formats import Quantization
from qlora_train.recipe import Recipe


@dataclass(frozen=True)
class Workload:
    """One optimizer step of a run.

    documents: token counts of the documents of one micro-batch; their sum is T. known_most_documents: in any
    micro-batch of the data; 0: not known. num_supervised: S, supervised tokens of one micro-batch.
    num_micro_batches: K. micro_batch_size: bins of one. lora_ranks: of every linear that has LoRA parameters,
    by module path. splits_learning_rate: B has its own (LoRA+). target: where it runs. deterministic: torch
    is told to give the same bits in every run.
    """

    shape: ModelShape
    quantization: Quantization
    dtype: torch.dtype
    lora_ranks: tuple[tuple[str, int], ...]
    dropout: bool
    documents: tuple[int, ...]
    num_supervised: int
    num_micro_batches: int
    optimizer: str
    target: DeviceDescription
    deterministic: bool = False
    splits_learning_rate: bool = False
    reference: bool = False
    known_most_documents: int = 0
    micro_batch_size: int = field(default=1, compare=False)  # documents say as much

    @property
    def on_accelerator(self) -> bool:
        """Whether the device's memory is not the host's."""
        return self.target.is_accelerator

    @property
    def num_tokens(self) -> int:
        return sum(self.documents)

    @property
    def split(self) -> Split:
        return Split(self.micro_batch_size, self.num_micro_batches)

    @property
    def tokens_per_step(self) -> int:
        """Of all micro-batches."""
        return self.num_micro_batches * self.num_tokens

    @property
    def itemsize(self) -> int:
        return self.dtype.itemsize

    @property
    def x_bytes(self) -> int:
        """Of a layer's input for one micro-batch."""
        return self.num_tokens * self.shape.hidden * self.itemsize

    @property
    def lora_sizes(self) -> tuple[int, int]:
        """(numbers in all A, numbers in all B)."""
        shapes = self.shape.linear_shapes
        return (
            sum(rank * shapes[path][1] for path, rank in self.lora_ranks),
            sum(rank * shapes[path][0] for path, rank in self.lora_ranks),
        )

    @property
    def num_lora_parameters(self) -> int:
        return sum(self.lora_sizes)

    @property
    def layer_buffer_sizes(self) -> tuple[tuple[int, int], ...]:
        """(bytes of codes, bytes of the rest) of every layer's quantized weights."""
        return _layer_buffer_sizes(self.shape, self.quantization, self.dtype)

    @property
    def layer_buffer_bytes(self) -> int:
        """Of the largest layer."""
        return max(map(sum, self.layer_buffer_sizes))

    @property
    def matrix_bytes(self) -> int:
        """Of the embedding, or a head that is not quantized."""
        return self.shape.matrix_parameters * self.itemsize

    @property
    def head_is_quantized(self) -> bool:
        return self.head_format.is_quantized

    @property
    def head_format(self) -> RowLayout:
        """How the head's rows are stored."""
        return self.shape.head_format(self.dtype)

    @property
    def head_bytes(self) -> int:
        """Of the head as it is stored; of the one matrix where it is tied."""
        return self.shape.vocabulary * self.head_format.row_bytes

    @property
    def most_documents(self) -> int:
        """In any micro-batch, as far as is known."""
        return max(self.known_most_documents, len(self.documents))


@lru_cache(maxsize=64)
def _layer_buffer_sizes(
    shape: ModelShape, quantization: Quantization, dtype: torch.dtype
) -> tuple[tuple[int, int], ...]:
    sizes = {}
    for layer in set(shape.layers):
        layout = layer.layout(quantization, dtype)
        codes = sum(entry.num_bytes for entry in layout.entries if entry.tensor == "data")
        sizes[layer] = (codes, layout.num_bytes - codes)
    return tuple(sizes[layer] for layer in shape.layers)


def workload_of(
    recipe: Recipe,
    shape: ModelShape,
    target: DeviceDescription,
    documents: Sequence[int] | None = None,
    most_documents: int = 0,
    split: Split | None = None,
) -> Workload:
    """The step that a recipe asks for, divided as `split` says; None: into the largest micro-batches.

    documents: token counts of a micro-batch's documents; None: each fills a bin, every token supervised. Data
    can take more in two ways: flash attention's sums have 128 rows more for every document, which
    most_documents tells; and without flash attention documents are gathered and padded (model/attention.py).
    """
    model, training = recipe.model, recipe.training
    split = split or splits_of(recipe)[0]
    chosen = choose_targets(recipe.lora, shape.linear_shapes, shape.expert_paths)
    lengths = tuple(documents or (recipe.data.sequence_length,) * split.micro_batch_size)
    return Workload(
        shape=shape,
        quantization=Quantization(model.quantization, model.double_quant),
        dtype=getattr(torch, dtype_of(recipe, target)),
        lora_ranks=tuple((path, target.rank) for path, target in chosen.items()),
        dropout=recipe.lora.dropout > 0,
        documents=lengths,
        num_supervised=sum(lengths) - len(lengths),
        num_micro_batches=split.num_micro_batches,
        micro_batch_size=split.micro_batch_size,
        optimizer=training.optimizer,
        target=target,
        deterministic=training.deterministic is True,
        splits_learning_rate=training.lora_b_lr_ratio != 1.0,
        reference=training.kernels == "reference",
        known_most_documents=most_documents,
    )
