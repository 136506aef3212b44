"""liger-kernel's kernels on a GPU: plain torch's results, the same bits again, and in less time."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from tiny_models import tiny_config
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

from qlora_train.device.compute import ComputeDevice
from qlora_train.kernels.liger import Liger, liger_for
from qlora_train.kernels.rms_norm import rms_norm
from qlora_train.model.fused import NEAR, FusedNorm, fuse_norms

pytestmark = pytest.mark.gpu
NORM_SHAPES = [(1, 1, 4), (3, 130), (7, 4095), (2, 512, 4096), (40_000, 128), (5, 16384)]
SILU_SHAPES = [(1, 3), (7, 130), (33, 11008), (129, 14336), (2, 53248)]


@pytest.fixture
def liger(device: ComputeDevice) -> Liger:
    pytest.importorskip("liger_kernel", reason="liger-kernel is not installed (extra gpu)")
    found = liger_for(device)
    if found is None:
        pytest.skip("liger-kernel is installed but cannot be used here; the warning says why")
    return found


def random(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device, seed: int) -> Tensor:
    generator = torch.Generator(device).manual_seed(seed)
    return torch.randn(shape, generator=generator, device=device).mul_(3).to(dtype)


def is_near(found: Tensor, expected: Tensor) -> bool:
    assert found.shape == expected.shape and found.dtype == expected.dtype
    worst = (found.double() - expected.double()).abs().max() / expected.double().abs().max()
    return bool(worst <= NEAR[expected.dtype])


def run_norm(x: Tensor, weight: Tensor, gradient: Tensor, offset: float, liger: Liger | None) -> list[Tensor]:
    leaf = x.clone().requires_grad_()
    y = rms_norm(leaf, weight, 1e-5, offset, liger)
    y.backward(gradient)
    return [y.detach(), leaf.grad]


@pytest.mark.parametrize("offset", [0.0, 1.0])
@pytest.mark.parametrize("dtype", NEAR, ids=str)
@pytest.mark.parametrize("shape", NORM_SHAPES, ids=str)
def test_rms_norm(gpu, liger, shape, dtype, offset) -> None:
    x, gradient = (random(shape, dtype, gpu, seed) for seed in (1, 2))
    weight, before = random(shape[-1:], dtype, gpu, 3), gradient.clone()
    expected, found, again = (run_norm(x, weight, gradient, offset, used) for used in (None, liger, liger))
    assert all(is_near(f, e) for f, e in zip(found, expected, strict=True))
    assert all(torch.equal(f, a) for f, a in zip(found, again, strict=True))
    assert torch.equal(gradient, before)


def run_silu(gate: Tensor, up: Tensor, gradient: Tensor, liger: Liger) -> list[Tensor]:
    d_gate, d_up = gate.clone(), up.clone()
    product = liger.silu_mul(gate, up)
    liger.silu_mul_backward_(d_gate, d_up, gradient)
    return [product, d_gate, d_up]


@pytest.mark.parametrize("dtype", NEAR, ids=str)
@pytest.mark.parametrize("shape", SILU_SHAPES, ids=str)
def test_silu_mul(gpu, liger, shape, dtype) -> None:
    gate, up, gradient = (random(shape, dtype, gpu, seed) for seed in (1, 2, 3))
    wide_gate, wide_up = (t.double().requires_grad_() for t in (gate, up))
    product = F.silu(wide_gate) * wide_up
    product.backward(gradient.double())
    expected = [t.detach().to(dtype) for t in (product, wide_gate.grad, wide_up.grad)]
    found, again = (run_silu(gate, up, gradient, liger) for _ in range(2))
    assert all(is_near(f, e) for f, e in zip(found, expected, strict=True))
    assert all(torch.equal(f, a) for f, a in zip(found, again, strict=True))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("family", ["llama", "gemma", "qwen3"])
def test_every_norm_of_a_layer_uses_it(gpu, liger, family, dtype) -> None:
    model = AutoModelForCausalLM.from_config(tiny_config(family), dtype=dtype).to(gpu)
    layers: nn.ModuleList = model.get_decoder().layers
    fuse_norms(layers, liger)
    norms = [m for m in layers.modules() if type(m).__name__.endswith("Norm")]
    assert norms and all(isinstance(norm, FusedNorm) and norm.liger is liger for norm in norms)


def test_it_takes_less_time_than_torch(gpu, liger, gpu_seconds, record_property) -> None:
    """A layer of an 8B model at 8,192 tokens in bfloat16."""
    x, gradient = (random((8192, 4096), torch.bfloat16, gpu, seed) for seed in (1, 2))
    weight = random((4096,), torch.bfloat16, gpu, 3)
    gate, up, d_product = (random((8192, 14336), torch.bfloat16, gpu, seed) for seed in (4, 5, 6))

    def torch_silu() -> None:
        leaf = gate.detach().requires_grad_()
        activated = F.silu(leaf)
        _ = activated.detach() * up
        torch.autograd.grad(activated, leaf, d_product * up)
        _ = d_product * activated.detach()

    def liger_silu() -> None:
        liger.silu_mul(gate, up)
        liger.silu_mul_backward_(gate, up, d_product)

    times = {
        "norm, torch": gpu_seconds(lambda i: run_norm(x, weight, gradient, 0.0, None)),
        "norm, liger": gpu_seconds(lambda i: run_norm(x, weight, gradient, 0.0, liger)),
        "MLP backward, torch": gpu_seconds(lambda i: torch_silu()),
        "MLP backward, liger": gpu_seconds(lambda i: liger_silu()),
    }
    said = f"{torch.cuda.get_device_name(gpu)}: " + ", ".join(
        f"{n} {t * 1e6:.0f} us" for n, t in times.items()
    )
    record_property("elementwise", said)
    print(said)
    assert times["norm, liger"] < times["norm, torch"], said
    assert times["MLP backward, liger"] < times["MLP backward, torch"], said
