"""The principal part of weights: PEFT's numbers, and a residual that loses less when it is quantized."""

from __future__ import annotations

from itertools import accumulate
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, get_peft_model
from tiny_runs import write_base
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile

from qlora_train.adapter.adapter_config import AdapterConfig
from qlora_train.adapter.pissa import initial_values
from qlora_train.device.compute import THE_CPU
from qlora_train.errors import BaseModelError
from qlora_train.model.base import MetaModel, read_config
from qlora_train.quant.formats import UNQUANTIZED, Quantization
from qlora_train.recipe import LoraSection
from qlora_train.weights.load import load_base
from qlora_train.weights.principal_part import principal_part, principal_part_bytes


def decaying_weight(out: int, columns: int, seed: int = 0) -> Tensor:
    """With singular values 1, 1/2, 1/3, ..., as trained weights have a few large ones."""
    generator = torch.Generator().manual_seed(seed)
    u, _, vh = torch.linalg.svd(torch.randn(out, columns, generator=generator), full_matrices=False)
    return (u / torch.arange(1, u.shape[1] + 1)) @ vh


@pytest.mark.parametrize(("out", "columns"), [(24, 40), (40, 24)])
@pytest.mark.parametrize("init", ["pissa", "pissa_niter_16"])
@pytest.mark.parametrize("rslora", [False, True])
def test_a_and_b_and_the_residual_are_pefts(out: int, columns: int, init: str, rslora: bool) -> None:
    weight = decaying_weight(out, columns)
    model = nn.Sequential(nn.Linear(columns, out, bias=False))
    model[0].weight.data.copy_(weight)
    given = LoraConfig(r=4, lora_alpha=6, target_modules=["0"], init_lora_weights=init, use_rslora=rslora)
    peft = get_peft_model(model, given).base_model.model[0]
    near = 1e-4 if init == "pissa" else 2e-3  # another sketch
    part = principal_part(weight, 4, int(init.partition("_niter_")[2] or 0) or None)
    config = AdapterConfig("", 4, 6, use_rslora=rslora)
    a, b = initial_values(config, {"0": part})["0"]
    peft_a, peft_b = peft.lora_A["default"].weight, peft.lora_B["default"].weight
    assert config.scaling == peft.scaling["default"]
    torch.testing.assert_close(b @ a, peft_b @ peft_a, rtol=near, atol=near)
    torch.testing.assert_close(a.norm(dim=1), peft_a.norm(dim=1), rtol=near, atol=near)
    torch.testing.assert_close(weight - part[1] @ part[0], peft.base_layer.weight, rtol=near, atol=near)


def test_subspace_iteration_comes_close_to_the_best_part_and_is_the_same_every_time() -> None:
    weight = decaying_weight(96, 160)
    best, rough, fine = (_distance(weight, principal_part(weight, 8, n)) for n in (None, 0, 16))
    assert best <= fine < 1.001 * best < rough
    assert all(map(torch.equal, principal_part(weight, 8, 4), principal_part(weight, 8, 4)))


def _distance(weight: Tensor, part: tuple[Tensor, Tensor]) -> float:
    return float((weight - part[1] @ part[0]).norm())


@pytest.mark.parametrize("num_iterations", [None, 16])
@pytest.mark.parametrize("shape", [(700, 200), (256, 640), (512, 512)])
def test_the_stated_bytes_are_enough_and_not_too_many(
    num_iterations: int | None, shape: tuple[int, int]
) -> None:
    """Of what torch allocates inside its operations; LAPACK's own workspace is not seen."""
    weight = torch.randn(shape)
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiled:
        principal_part(weight, 8, num_iterations)
    events = (event for event in profiled.profiler.kineto_results.events() if event.name() == "[memory]")
    peak = weight.nbytes + max(accumulate(event.nbytes() for event in events))
    assert peak <= principal_part_bytes(shape, 8, num_iterations) <= (1.6 if num_iterations else 2.3) * peak


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_base(tmp_path_factory.mktemp("decaying") / "base")


def dequantized(base: Path, quantization: Quantization, lora: LoraSection | None) -> dict[str, Tensor]:
    """What the linears of the base do, with what PiSSA took out of them."""
    decoder = load_base(base, quantization, torch.float32, THE_CPU, lora=lora)
    weights = {}
    for layer in decoder.layers_in_turn():
        with decoder.weights.layer_on_device(layer):
            for name, linear in decoder.linears.items():
                if f".{layer}." in name:
                    weights[name] = linear.source.dequantize(name, torch.float32).clone()
    for name, (a, b) in decoder.principal_factors.items():
        weights[name] += b @ a
    return weights


@pytest.mark.parametrize("format_name", ["nf4", "fp4", "int8"])
def test_the_residual_loses_less_by_quantization(base: Path, format_name: str) -> None:
    pissa = LoraSection(rank=8, init_lora_weights="pissa", exclude_modules=("o_proj",))
    quantization = Quantization(format_name)
    exact, plain, ours = (
        dequantized(base, *which)
        for which in ((UNQUANTIZED, None), (quantization, None), (quantization, pissa))
    )
    for name, weight in exact.items():
        error, usual = (ours[name] - weight).norm(), (plain[name] - weight).norm()
        assert torch.equal(ours[name], plain[name]) if "o_proj" in name else error < 0.97 * usual, name


def test_a_rank_beyond_the_singular_values_is_refused_by_name(base: Path) -> None:
    lora = LoraSection(rank=500, init_lora_weights="pissa")
    with pytest.raises(BaseModelError, match=r"q_proj is \[64, 64\], so it has 64 .* fewer than .* rank 500"):
        MetaModel(read_config(base), torch.float32, lora)
