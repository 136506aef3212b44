"""What a run asks for, as numbers: everything but the execution plan that decides bytes and time.

Shape of the model, packing, factors, tokens per micro-batch, optimizer. One `Workload` and one
`ExecutionPlan` give one prediction (byte_model.py, time_model.py); the planner varies the plan.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

from qlora_train.device.description import DeviceDescription
from qlora_train.errors import UserError
from qlora_train.memory.plan.layer_settings import LayerSettings
from qlora_train.memory.plan.model_shape import ModelShape
from qlora_train.memory.plan.packed_sizes import PackingSizes
from qlora_train.recipe import Recipe

ITEMSIZES = {"bfloat16": 2, "float16": 2, "float32": 4}


@dataclass(frozen=True)
class Workload:
    """One optimizer step of a run.

    documents: token counts of the documents of one micro-batch; their sum is T. known_most_documents: in any
    micro-batch of the data; 0: not known. num_supervised: S, supervised tokens of one micro-batch.
    num_micro_batches: K. targets: linears with factors, by name within a layer. skips_tail: recomputation may
    leave the last product out. splits_learning_rate: B has its own (LoRA+). target: where it runs.
    deterministic: torch is told to give the same bits in every run.
    """

    shape: ModelShape
    packing: PackingSizes
    rank: int
    targets: tuple[str, ...]
    dropout: bool
    documents: tuple[int, ...]
    num_supervised: int
    num_micro_batches: int
    optimizer: str
    target: DeviceDescription
    deterministic: bool = False
    splits_learning_rate: bool = False
    reference: bool = False
    skips_tail: bool = True
    known_most_documents: int = 0

    @property
    def on_accelerator(self) -> bool:
        """Whether the device's memory is not the host's."""
        return self.target.is_accelerator

    @property
    def num_tokens(self) -> int:
        return sum(self.documents)

    @property
    def tokens_per_step(self) -> int:
        """Of all micro-batches."""
        return self.num_micro_batches * self.num_tokens

    @property
    def itemsize(self) -> int:
        return self.packing.itemsize

    @property
    def factor_parts(self) -> tuple[int, int]:
        """(numbers in all A, numbers in all B)."""
        shapes = self.shape.linear_shapes()
        a = sum(self.rank * shapes[name][1] for name in self.targets)
        b = sum(self.rank * shapes[name][0] for name in self.targets)
        return a * self.shape.num_layers, b * self.shape.num_layers

    @property
    def num_factor_numbers(self) -> int:
        return sum(self.factor_parts)

    @property
    def slab_bytes(self) -> int:
        return self.packing.slab_bytes(self.shape.linear_shapes())

    @property
    def matrix_bytes(self) -> int:
        """Of the embedding, or a head that is not packed."""
        return self.shape.matrix_parameters * self.itemsize

    @property
    def head_is_packed(self) -> bool:
        return self.shape.head_format != "none"

    @property
    def head_packing(self) -> PackingSizes:
        """Of the head's rows."""
        return PackingSizes(self.shape.head_format, False, self.itemsize)

    @property
    def head_bytes(self) -> int:
        """Of the head as it is stored; of the one matrix where it is tied."""
        return self.shape.vocabulary * self.head_packing.row_bytes(self.shape.hidden)

    @property
    def most_documents(self) -> int:
        """In any micro-batch, as far as is known."""
        return max(self.known_most_documents, len(self.documents))

    def layer_settings(self, *, hold_unpacked: bool, mlp_tile_tokens: int | None) -> LayerSettings:
        return LayerSettings(
            self.shape,
            self.packing,
            self.rank,
            frozenset(self.targets),
            self.dropout,
            self.documents,
            self.target,
            self.deterministic,
            hold_unpacked=hold_unpacked,
            mlp_tile_tokens=mlp_tile_tokens,
            skip_tail=self.skips_tail and self.shape.may_skip_tail,
            reference=self.reference,
            most_documents=self.most_documents,
        )


def dtype_of(recipe: Recipe, target: DeviceDescription) -> str:
    """The compute dtype; `auto`, unless resolved before, counts as bfloat16 on a GPU that multiplies it, as
    float16 on another, and as float32 on a CPU."""
    dtype = recipe.model.compute_dtype
    if dtype != "auto":
        return dtype
    if not target.is_accelerator:
        return "float32"
    return "bfloat16" if target.has_bfloat16 else "float16"


def workload_of(
    recipe: Recipe,
    shape: ModelShape,
    target: DeviceDescription,
    documents: Sequence[int] | None = None,
    most_documents: int = 0,
) -> Workload:
    """The step that a recipe asks for.

    documents: token counts of a micro-batch's documents; None: each fills a bin, every token supervised. Data
    can take more in two ways: flash attention's sums have 128 rows more for every document, which
    most_documents tells; and without flash attention documents are gathered and padded (model/attention.py).
    """
    model, training = recipe.model, recipe.training
    lengths = tuple(documents or (recipe.data.sequence_length,) * training.micro_batch_size)
    return Workload(
        shape=shape,
        packing=PackingSizes(model.quantization, model.double_quant, ITEMSIZES[dtype_of(recipe, target)]),
        rank=recipe.lora.rank,
        targets=_targets(recipe.lora.target_modules, shape),
        dropout=recipe.lora.dropout > 0,
        documents=lengths,
        num_supervised=sum(lengths) - len(lengths),
        num_micro_batches=training.gradient_accumulation_steps,
        optimizer=training.optimizer,
        target=target,
        deterministic=training.deterministic is True,
        splits_learning_rate=training.lora_b_lr_ratio != 1.0,
        reference=training.kernels == "reference",
        known_most_documents=most_documents,
    )


def _targets(targets: str | Sequence[str], shape: ModelShape) -> tuple[str, ...]:
    names = tuple(shape.linear_shapes())
    if isinstance(targets, str):
        return names
    if not shape.is_known:  # its linears may have other names; the model itself will be asked
        chosen = tuple(name for name in names if any(name.endswith("." + e) for e in targets))
        return chosen or names
    targets = [
        re.sub(r"^.*\blayers\.\d+\.", "", target) for target in targets
    ]  # all layers are planned alike
    missing = [e for e in targets if not any(name == e or name.endswith("." + e) for name in names)]
    if missing:
        raise UserError(
            f"lora.target_modules: {', '.join(missing)} matches no linear layer of this model; "
            f"it has {', '.join(names)} (or use all-linear)"
        )
    return tuple(name for name in names if any(name == e or name.endswith("." + e) for e in targets))
