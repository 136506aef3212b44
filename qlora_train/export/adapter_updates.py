"""What an adapter adds to the tensors of a checkpoint.

Most tensors are the weight of one linear, W + s B A. Weights of experts are in a tensor of each expert and
projection, or in one of all experts: there every expert has its own B and A (model/expert_lora.py).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from torch import Tensor

from qlora_train.adapter.adapter_config import HEAD, AdapterConfig, match_modules
from qlora_train.adapter.adapter_files import LoraPairs
from qlora_train.adapter.expert_parameters import refuse_older_orientation
from qlora_train.errors import ExportError
from qlora_train.model.expert_lora import ExpertStack, by_expert, expert_stacks
from qlora_train.weights.base_checkpoint import BaseCheckpoint


@dataclass(frozen=True)
class LinearUpdate:
    """What an adapter adds to a tensor W [out, in]: s B A, and with DoRA (A, B, m) the lengths of its
    rows."""

    tensors: tuple[Tensor, ...]
    scaling: float
    has_magnitudes: bool

    def add_to(self, values: Tensor, start: int) -> None:
        """values [n, in] in fp32: the rows of the tensor from `start` on."""
        a, b, *m = self.tensors
        stop = start + len(values)
        values.addmm_(b[start:stop], a, alpha=self.scaling)
        if m and self.has_magnitudes:
            values.mul_((m[0][start:stop] / values.norm(dim=1))[:, None])


@dataclass(frozen=True)
class ExpertsUpdate:
    """What an adapter adds to the weights of one expert, [rows, columns], or of all, [E, rows, columns]: s
    times left [E, rows, R] right [E, R, columns]. first_row: of the tensor, among those of all experts."""

    left: Tensor
    right: Tensor
    scaling: float
    first_row: int

    def add_to(self, values: Tensor, start: int) -> None:
        """values [n, ...] in fp32: from `start` on, rows of one expert or whole experts."""
        if values.dim() == 3:
            for expert, weight in enumerate(values, start):
                weight.addmm_(self.left[expert], self.right[expert], alpha=self.scaling)
            return
        expert, row = divmod(self.first_row + start, self.left.shape[1])
        values.addmm_(self.left[expert, row : row + len(values)], self.right[expert], alpha=self.scaling)


@dataclass(frozen=True)
class BiasUpdate:
    """What an adapter with `lora_bias` adds to the bias of a linear."""

    bias: Tensor
    scaling: float

    def add_to(self, values: Tensor, start: int) -> None:
        """values [n] in fp32: from `start` on."""
        values.add_(self.bias[start : start + len(values)], alpha=self.scaling)


Update = LinearUpdate | ExpertsUpdate | BiasUpdate


def updates_of(
    config: AdapterConfig,
    lora: LoraPairs,
    checkpoint: BaseCheckpoint,
    head: str,
    shapes: Mapping[str, tuple[int, ...]],
) -> dict[str, Update]:
    """What is added to each tensor, by its name.

    config, lora: the adapter, with paths as in its files. head: the tensor of the head. shapes: of the
    tensors of the checkpoint, which may have other names than the model's parameters. Raises
    `ExportError` where the adapter does not fit the base, and `BaseModelError` for experts in the orientation
    of older files."""
    meta_model = checkpoint.meta_model
    tensors_by_path = {HEAD: head} if head in shapes else {}
    for layer, layer_path in enumerate(meta_model.layer_paths):
        for name, _ in meta_model.layer_shapes(layer).linears:
            tensors_by_path[f"{layer_path}.{name}"] = checkpoint.find(f"{layer_path}.{name}.weight")
    stacks = expert_stacks(meta_model.model)
    names = match_modules(lora, [*tensors_by_path, *stacks])
    found: dict[str, Update] = {}
    for path, tensors in lora.items():
        if path not in names:
            raise ExportError(
                f"the adapter trains {path}, but {checkpoint.folder} has no tensor {path}.weight. "
                "Is this the base it was trained on?"
            )
        name = names[path]
        if name in stacks:
            found |= _of_experts(config, path, tensors, stacks[name], checkpoint)
            continue
        (a, b, *_), tensor = tensors, tensors_by_path[name]
        if shapes[tensor] != (len(b), a.shape[1]):
            raise ExportError(
                f"the adapter's A and B for {path} make a [{len(b)}, {a.shape[1]}] weight, but {tensor} in "
                f"{checkpoint.folder} is {list(shapes[tensor])}. Is this the base it was trained on?"
            )
        found[tensor] = LinearUpdate(tensors, config.scaling_of(path), config.use_dora)
        if config.lora_bias:
            bias = f"{tensor.removesuffix('.weight')}.bias"
            if bias not in shapes:
                raise ExportError(
                    f"the adapter trains a bias (lora_bias), and {checkpoint.folder} has no {bias} to add it "
                    "to. Use the adapter beside the base."
                )
            found[bias] = BiasUpdate(tensors[2], config.scaling_of(path))
    return found


def _of_experts(
    config: AdapterConfig,
    path: str,
    tensors: tuple[Tensor, ...],
    stack: ExpertStack,
    checkpoint: BaseCheckpoint,
) -> dict[str, Update]:
    """What is added to the tensors that make up a parameter of experts. path: in the adapter."""
    a, b = tensors
    num_rows = stack.num_matrices * config.rank_of(path)
    refuse_older_orientation(path, a.shape, b.shape, stack.in_features, stack.out_features)
    if (a.shape, b.shape) != ((num_rows, stack.in_features), (stack.out_features, num_rows)):
        raise ExportError(
            f"the adapter's A and B for {path} are {list(a.shape)} and {list(b.shape)}, but "
            f"{checkpoint.folder} has {stack.num_matrices} experts of {stack.out_features} x "
            f"{stack.in_features} numbers. Is this the base it was trained on?"
        )
    a, b = by_expert(a, b, stack.num_matrices)
    factors = (a.transpose(1, 2), b.transpose(1, 2)) if stack.is_transposed else (b, a)
    return {
        name: ExpertsUpdate(*factors, config.scaling_of(path), part.start)
        for name, part in checkpoint.parts_of(stack.name).items()
    }
