"""The workload of a run: everything that decides its bytes and time, apart from the execution plan.

Model sizes, quantization, LoRA parameters, tokens per micro-batch, optimizer. One `Workload` and one
`ExecutionPlan` give one prediction (planned_walk.py, time_model.py); the planner varies the plan.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import lru_cache

import torch

from qlora_train.adapter.lora_targets import choose_targets
from qlora_train.adapter.pissa import num_iterations, principal_ranks
from qlora_train.device.description import DeviceDescription
from qlora_train.model.quantized_matrix import RowLayout
from qlora_train.plan.host_budget import dtype_of
from qlora_train.plan.model_shape import ModelShape
from qlora_train.plan.split import Split, splits_of
from qlora_train.quant.formats import Quantization
from qlora_train.recipe import Recipe
from qlora_train.recipe.module_patterns import Number


@dataclass(frozen=True)
class Workload:
    """One optimizer step of a run; by default of a model without LoRA parameters, which takes one token.

    documents: token counts of the documents of one micro-batch; their sum is T. known_most_documents: the
    largest number in any micro-batch of the data; 0: unknown. num_supervised: S, supervised tokens of one
    micro-batch. num_micro_batches: K. micro_batch_size: bins in a micro-batch. lora_ranks: (module path,
    rank) of every linear, and parameter of experts, with LoRA parameters. splits_learning_rate: B has its own
    (LoRA+). target: the device. deterministic: torch uses deterministic algorithms only. reference: the plain
    implementation, without tiles and fused kernels. use_dora: every linear with LoRA parameters has
    magnitudes too. lora_bias: or biases. num_added_tokens: tokens whose rows in embedding and head are
    trained. principal_ranks: (module path, rank) of linears that PiSSA decomposes, in num_iterations (None:
    exactly).
    """

    shape: ModelShape
    quantization: Quantization
    dtype: torch.dtype
    target: DeviceDescription
    lora_ranks: tuple[tuple[str, int], ...] = ()
    dropout: bool = False
    documents: tuple[int, ...] = (1,)
    num_supervised: int = 0
    num_micro_batches: int = 1
    optimizer: str = "adamw"
    deterministic: bool = False
    splits_learning_rate: bool = False
    reference: bool = False
    use_dora: bool = False
    num_added_tokens: int = 0
    lora_bias: bool = False
    principal_ranks: tuple[tuple[str, int], ...] = ()
    num_iterations: int | None = None
    known_most_documents: int = 0
    micro_batch_size: int = field(default=1, compare=False)  # `documents` decides it

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
        """Tokens of all micro-batches of a step on one rank."""
        return self.num_micro_batches * self.num_tokens

    @property
    def itemsize(self) -> int:
        return self.dtype.itemsize

    @property
    def x_bytes(self) -> int:
        """Bytes of a layer's input for one micro-batch."""
        return self.num_tokens * self.shape.hidden * self.itemsize

    @property
    def lora_sizes(self) -> tuple[int, int]:
        """(numbers in all A and rows of tokens, numbers in all B and m or biases)."""
        num_a = self.num_added_tokens * (1 if self.shape.is_tied else 2) * self.shape.hidden
        num_b = self.num_of_rows
        for path, rank in self.lora_ranks:
            rows, columns, number = self.shape.adaptable_shapes[path]
            num_a, num_b = num_a + rank * number * columns, num_b + rank * number * rows
        return num_a, num_b

    @property
    def lora_per_token(self) -> int:
        """Numbers in A and B that a token is multiplied by: of experts, those it goes through."""
        total, most_experts = 0, max(1, self.shape.experts_per_token)
        for path, rank in self.lora_ranks:
            rows, columns, number = self.shape.adaptable_shapes[path]
            total += rank * (rows + columns) * min(number, most_experts)
        return total

    @property
    def num_of_rows(self) -> int:
        """Numbers in all m of DoRA, or in all biases: the rows of the linears that are trained."""
        if not self.use_dora and not self.lora_bias:
            return 0
        return sum(self.shape.linear_shapes[path][0] for path, _ in self.lora_ranks)

    @property
    def num_lora_parameters(self) -> int:
        return sum(self.lora_sizes)

    @property
    def adapter_bytes(self) -> int:
        """Bytes of a written adapter, which after PiSSA has twice the rank."""
        return (8 if self.principal_ranks else 4) * self.num_lora_parameters

    @property
    def factor_bytes(self) -> int:
        """Bytes of what PiSSA takes out of the base; 0 without it."""
        return 4 * self.num_lora_parameters if self.principal_ranks else 0

    def of_decompositions(
        self, quantity: Callable[[tuple[int, int], int, int | None], Number]
    ) -> list[Number]:
        """A quantity of the decomposition of every linear that PiSSA decomposes."""
        shapes = self.shape.linear_shapes
        return [quantity(shapes[path], rank, self.num_iterations) for path, rank in self.principal_ranks]

    @property
    def layer_buffer_sizes(self) -> tuple[tuple[int, int], ...]:
        """(bytes of codes, bytes of quantization constants) for every layer's quantized weights."""
        return _layer_buffer_sizes(self.shape, self.quantization, self.dtype)

    @property
    def layer_buffer_bytes(self) -> int:
        """Bytes of the largest layer's quantized weights."""
        return max(map(sum, self.layer_buffer_sizes))

    @property
    def matrix_bytes(self) -> int:
        """Bytes of the embedding, or of an unquantized head."""
        return self.shape.matrix_parameters * self.itemsize

    @property
    def head_is_quantized(self) -> bool:
        return self.head_format.is_quantized

    @property
    def head_format(self) -> RowLayout:
        """The storage format of the head's rows."""
        return self.shape.head_format(self.dtype)

    @property
    def head_bytes(self) -> int:
        """Bytes of the head as it is stored; where it is tied, those of the embedding."""
        return self.shape.vocabulary * self.head_format.row_bytes

    @property
    def most_documents(self) -> int:
        """The largest number of documents in a micro-batch, as far as is known."""
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
    """The workload of a recipe's step. split: into micro-batches; None: into the largest ones.

    documents: token counts of a micro-batch's documents; None: each fills a bin, every token supervised.
    Shorter documents can need more memory in two cases: flash attention's sums have up to 128 rows more for
    every document, which most_documents accounts for; and without flash attention documents are gathered and
    padded (model/attention.py).
    """
    model, training = recipe.model, recipe.training
    split = split or splits_of(recipe)[0]
    chosen = choose_targets(recipe.lora, shape.linear_shapes, shape.expert_shapes)
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
        use_dora=recipe.lora.use_dora,
        num_added_tokens=len(model.add_tokens),
        lora_bias=recipe.lora.lora_bias,
        principal_ranks=tuple(principal_ranks(recipe.lora, shape.linear_shapes).items()),
        num_iterations=num_iterations(recipe.lora),
        known_most_documents=most_documents,
    )
