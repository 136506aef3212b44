"""LoRA on the weights of experts: W_e + s B_e A_e for each of E experts.

One `ExpertStack` stands for the matrices of one name (gate_up_proj, down_proj) of all experts of a layer. Its
LoRA parameters are two tensors, as PEFT 0.21 has them, so that buffers, checkpoints and files hold the same:

    A [E R, in]     the R rows of one expert after another
    B [out, R E]    column r E + e is column r of expert e

With x [n, in] the rows of expert e, g = dL/dy and v = s g B_e:

    y += s (x A_e^T) B_e^T      dA_e = v^T x      dB_e = s g^T (x A_e^T)      dx += v A_e

dA and dB are added to the flat fp32 gradient, as those of linears (linear.py). There is no dropout: PEFT,
which computes with W + s B A, cannot have it.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor, nn

from qlora_train.model.linear import LinearLora


class ExpertStack(nn.Module):
    """The matrices of one name of all experts of a layer, without their weights.

    name: path of the library's parameter. num_matrices: E. is_transposed: the library and checkpoints hold
    them [in, out]. lora: None without LoRA parameters.
    """

    def __init__(
        self, name: str, in_features: int, out_features: int, num_matrices: int, is_transposed: bool
    ) -> None:
        super().__init__()
        self.name, self.num_matrices, self.is_transposed = name, num_matrices, is_transposed
        self.in_features, self.out_features = in_features, out_features
        self.lora: LinearLora | None = None

    def factors(self) -> list[tuple[Tensor, Tensor]]:
        """(A_e [R, in], B_e [out, R]) of every expert, as differentiable views; empty without LoRA."""
        if self.lora is None:
            return []
        a, b = by_expert(self.lora.A, self.lora.B, self.num_matrices)
        return list(zip(a.unbind(), b.unbind(), strict=True))

    def loras(self) -> list[ExpertLora]:
        """The LoRA parameters of every expert, B copied into their order; empty without LoRA."""
        if self.lora is None:
            return []
        a, b = by_expert(self.lora.A.detach(), self.lora.B.detach(), self.num_matrices)
        gradients = by_expert(self.lora.gradient_a, self.lora.gradient_b, self.num_matrices)
        parts = (a, b.contiguous(), *gradients)
        return [ExpertLora(*of_one, self.lora.scaling) for of_one in zip(*parts, strict=True)]

    def extra_repr(self) -> str:
        return f"{self.name}: {self.num_matrices} of {self.in_features} -> {self.out_features}"


def expert_stacks(model: nn.Module) -> dict[str, ExpertStack]:
    """The matrices of experts of all layers, by path of the library's parameter."""
    return {module.name: module for module in model.modules() if isinstance(module, ExpertStack)}


def by_expert(a: Tensor, b: Tensor, num_experts: int) -> tuple[Tensor, Tensor]:
    """A [E R, in] and B [out, R E] as views [E, R, in] and [E, out, R]."""
    return a.view(num_experts, -1, a.shape[1]), b.view(len(b), -1, num_experts).permute(2, 0, 1)


@dataclass(frozen=True)
class ExpertLora:
    """The LoRA parameters A [R, in] and B [out, R] of one expert's matrix, and views of the flat gradient."""

    a: Tensor
    b: Tensor
    gradient_a: Tensor
    gradient_b: Tensor
    scaling: float

    def add_product(self, y: Tensor, x: Tensor) -> None:
        """y [n, out] += s (x A^T) B^T."""
        y.addmm_(x @ self.a.t(), self.b.t(), alpha=self.scaling)

    def backward(self, gradient: Tensor, x: Tensor, dx: Tensor) -> None:
        """From gradient = dL/dy [n, out], add dL/dA and dL/dB to the flat gradient and their part to dx
        [n, in]."""
        v = (gradient @ self.b).mul_(self.scaling)
        self.gradient_a.add_(v.t() @ x)
        self.gradient_b.add_((gradient.t() @ (x @ self.a.t())).mul_(self.scaling))
        dx.addmm_(v, self.a)
