"""Frozen experts: the reference, what is saved, what is skipped, what the host reads, what is refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from layer_meter import workload_for
from safetensors.torch import load_file, save_file
from tiny_models import NF4, load_tiny, packed_row, random_model, resident_plan, tiny_config, write_checkpoint
from torch import Tensor
from transformers import AutoModelForCausalLM

from qlora_train.device.memory_tracker import StorageMeter
from qlora_train.errors import BaseModelError, UnsupportedModelError
from qlora_train.model import frozen_experts
from qlora_train.model import probe as probing
from qlora_train.model.decoder import FrozenDecoder
from qlora_train.model.frozen_experts import FrozenExperts, experts_forward
from qlora_train.plan.model_shape import known_shape, shape_of
from qlora_train.plan.planned_model import PlannedModel
from qlora_train.quant.formats import Quantization
from qlora_train.walk.layer_walk import LayerWalk
from qlora_train.weights.execution_plan import ActivationPolicy, Placement

LENGTHS = [25, 3, 40, 1, 16, 33]
NO = Quantization("none")


def experts_of(decoder: FrozenDecoder, index: int = 1) -> tuple[Any, FrozenExperts]:
    """The library's module and ours inside it."""
    module = next(m for m in decoder.layers[index].modules() if hasattr(m, "frozen"))
    return module, module.frozen


def routing(num_tokens: int, num_experts: int, num_chosen: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(3)
    scores = torch.rand(num_tokens, num_experts, generator=generator)
    weights, chosen = scores.topk(num_chosen, dim=1)
    return chosen, weights


def results(module: Any, x: Tensor, chosen: Tensor, weights: Tensor) -> list[Tensor]:
    """Output, and the gradients of x and of the routing weights for a random gradient."""
    x, weights = x.clone().requires_grad_(), weights.clone().requires_grad_()
    y = experts_forward(module, x, chosen, weights)
    y.backward(torch.randn(y.shape, generator=torch.Generator().manual_seed(4)))
    assert x.grad is not None and weights.grad is not None
    return [y.detach(), x.grad, weights.grad]


@pytest.mark.parametrize("with_lora", [False, True])
@pytest.mark.parametrize("quantization", [NO, NF4, Quantization("int8")])
@pytest.mark.parametrize("family", ["qwen3_moe", "gpt_oss", "nemotron_h"])
def test_output_and_gradients_are_those_of_the_reference(
    tmp_path: Path,
    family: str,
    quantization: Quantization,
    with_lora: bool,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Gated or not, transposed with biases or not; tiles of rows; some experts with no row at all."""
    decoder, lora = load_tiny(write_checkpoint(tmp_path, family), quantization, experts=with_lora)
    module, frozen = experts_of(decoder, len(decoder.layers) - 1)
    monkeypatch.setattr(frozen_experts, "TILE_ROWS", 7)
    x = torch.randn(37, decoder.config.hidden_size, generator=torch.Generator().manual_seed(1))
    chosen, weights = routing(37, frozen.num_experts - 1, 2)
    with decoder.weights.layer_on_device(len(decoder.layers) - 1):
        ours = results(module, x, chosen, weights)
        ours.append(lora.gradient.clone())
        lora.gradient.zero_()
        decoder.weights.copies_dequantized = frozen.use_autograd = True
        expected = results(module, x, chosen, weights)
        for of_layer in decoder.lora_of(len(decoder.layers) - 1):
            of_layer.collect_autograd()
        expected.append(lora.gradient)
    assert bool(ours[-1].count_nonzero()) is with_lora
    for found, wanted in zip(ours, expected, strict=True):
        torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-5 if with_lora else 1e-6)


def test_the_bits_do_not_depend_on_how_many_experts_are_dequantized_at_once(tmp_path: Path) -> None:
    decoder, _ = load_tiny(write_checkpoint(tmp_path, "qwen3_moe"))
    module, frozen = experts_of(decoder)
    x = torch.randn(50, 64, generator=torch.Generator().manual_seed(1))
    chosen, weights = routing(50, frozen.num_experts, 2)
    found = []
    for at_once in (1, 4, 16):
        decoder.weights.experts_at_once = at_once
        decoder.weights._chunk_sizes = {"gate_up_proj": 16 * 96 * 64, "down_proj": 16 * 48 * 64}  # type: ignore[attr-defined]
        with decoder.weights.layer_on_device(1):
            found.append(results(module, x, chosen, weights))
    for other in found[1:]:
        assert all(torch.equal(a, b) for a, b in zip(found[0], other, strict=True))


def test_leaving_out_the_last_product_is_right_here_and_wrong_under_plain_autograd(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Autograd takes the routing weight's gradient from the last product's value; ours from elsewhere."""
    decoder, _ = load_tiny(write_checkpoint(tmp_path, "mixtral"), NO)
    module, frozen = experts_of(decoder)
    x = torch.randn(30, 64, generator=torch.Generator().manual_seed(1))
    chosen, weights = routing(30, frozen.num_experts, 2)
    whole = results(module, x, chosen, weights)
    frozen.skip_output = True
    skipped = results(module, x, chosen, weights)
    assert not skipped[0].any()
    assert torch.equal(skipped[1], whole[1]) and torch.equal(skipped[2], whole[2])

    times, down = frozen_experts._times, frozen.shapes["down_proj"]

    def without_value(of: Any, rows: Tensor, weight: Tensor) -> Tensor:
        out = times(of, rows, weight)
        return out - out.detach() if tuple(weight.shape) == down else out

    frozen.use_autograd = True
    monkeypatch.setattr(frozen_experts, "_times", without_value)
    wrong = results(module, x, chosen, weights)
    torch.testing.assert_close(wrong[1], whole[1], rtol=1e-4, atol=1e-5)
    assert not wrong[2].any() and whole[2].abs().max() > 0.01


def test_the_host_reads_the_counts_once_for_a_layer_and_micro_batch(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In the forward pass; a recomputation finds them."""
    decoder, lora = load_tiny(write_checkpoint(tmp_path, "qwen3_moe"))
    reads: list[int] = []
    count = torch.searchsorted
    monkeypatch.setattr(torch, "searchsorted", lambda *a, **k: reads.append(1) or count(*a, **k))
    plan = resident_plan(*[ActivationPolicy.RECOMPUTE] * 3)
    rows = [packed_row(LENGTHS, seed=k) for k in range(2)]
    walk = LayerWalk(decoder, lora, plan, reference=False)
    walk.accumulate(rows, seed=0, step=1, num_supervised=50)
    assert len(reads) == 3 * 2
    before = lora.gradient.clone()
    lora.masters.mul_(1.5)  # other weights route otherwise: the next step counts anew
    lora.refresh_working()
    lora.gradient.zero_()
    walk.accumulate(rows, seed=0, step=2, num_supervised=50)
    fresh = lora.gradient.clone()
    lora.gradient.zero_()
    again = [packed_row(LENGTHS, seed=k) for k in range(2)]
    walk.accumulate(again, seed=0, step=2, num_supervised=50)
    assert torch.equal(lora.gradient, fresh) and not torch.equal(fresh, before)


def test_what_is_saved_is_the_input_and_the_routing(tmp_path: Path) -> None:
    """None of the experts' hidden values, however many there are."""
    decoder, _ = load_tiny(write_checkpoint(tmp_path, "olmoe"))
    module, frozen = experts_of(decoder)
    x = torch.randn(400, 64).requires_grad_()
    chosen, weights = routing(400, frozen.num_experts, 3)
    weights.requires_grad_()
    with decoder.weights.layer_on_device(1):
        experts_forward(module, x, chosen, weights)  # buffers are made once
        with StorageMeter("cpu") as meter:
            y = experts_forward(module, x, chosen, weights)
            kept = meter.live_bytes - y.nbytes
    assert kept == chosen.nbytes  # their order; x and the weights are the caller's


def test_qwen3_30b_keeps_17_megabytes_a_layer() -> None:
    """Its input and what its experts save at 4,096 tokens in 16 bits; 20 MB are allowed."""
    shape = known_shape("qwen3-30b-a3b")
    assert shape is not None
    decoder = PlannedModel(workload_for(shape.config, documents=(4096,))).decoder
    module, _ = experts_of(decoder, 0)
    x = torch.empty(4096, 2048, dtype=torch.bfloat16, device="meta", requires_grad=True)
    chosen = torch.empty(4096, 8, dtype=torch.int64, device="meta")
    weights = torch.empty(4096, 8, dtype=torch.bfloat16, device="meta", requires_grad=True)
    with StorageMeter("meta") as meter:
        y = experts_forward(module, x, chosen, weights)
        kept = meter.live_bytes - y.nbytes
    assert 17e6 < x.nbytes + weights.nbytes + kept < 17.2e6


@pytest.mark.parametrize("with_lora", [False, True])
def test_a_run_over_experts_from_disk_has_the_bits_of_a_resident_one(tmp_path: Path, with_lora: bool) -> None:
    folder = write_checkpoint(tmp_path, "glm4_moe")
    gradients = []
    for place in (Placement.DEVICE, Placement.RAM, Placement.DISK):
        plan = resident_plan(
            *[ActivationPolicy.RECOMPUTE] * 3,
            weights=(place,) * 3,
            num_slots=0 if place is Placement.DEVICE else 2,
        )
        decoder, lora = load_tiny(folder, plan=plan, experts=with_lora)
        loss = LayerWalk(decoder, lora, plan, reference=False).accumulate(
            [packed_row(LENGTHS)], seed=0, step=1, num_supervised=50
        )
        gradients.append((loss, lora.gradient.clone()))
        decoder.close()
    for loss, gradient in gradients[1:]:
        assert torch.equal(loss, gradients[0][0]) and torch.equal(gradient, gradients[0][1])


@pytest.mark.parametrize("family", ["qwen3_moe", "mixtral"])
def test_a_missing_expert_is_said(tmp_path: Path, family: str) -> None:
    folder = write_checkpoint(tmp_path, family)
    file = folder / "model.safetensors"
    tensors = load_file(file)
    lost = next(name for name in tensors if "experts.3." in name)
    save_file({name: t for name, t in tensors.items() if name != lost}, file, {"format": "pt"})
    with pytest.raises(BaseModelError, match="Is a part of the experts missing"):
        load_tiny(folder)


def test_a_checkpoint_with_all_experts_in_one_tensor_is_read_too(tmp_path: Path) -> None:
    model = random_model(tiny_config("qwen3_moe"))
    model.save_pretrained(tmp_path / "each")
    model.save_pretrained(tmp_path / "all", save_original_format=False)
    names = load_file(tmp_path / "all" / "model.safetensors")
    assert any(name.endswith("experts.gate_up_proj") for name in names)
    each, every = (load_tiny(tmp_path / name)[0] for name in ("each", "all"))
    assert each.fingerprint == every.fingerprint


def test_buffers_of_the_checkpoint_are_read(tmp_path: Path) -> None:
    """DeepSeek's correction of the router is one, in fp32; a checkpoint in bf16 has it all the same."""
    config = tiny_config("deepseek_v3")
    model = random_model(config)
    for name, buffer in model.named_buffers():
        if name.endswith("e_score_correction_bias"):
            buffer.normal_(generator=torch.Generator().manual_seed(2))
    model.save_pretrained(tmp_path)
    decoder, _ = load_tiny(tmp_path, NO, torch.bfloat16)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    found = [b for layer in decoder.layers for n, b in layer.named_buffers() if n.endswith("correction_bias")]
    wanted = [b for n, b in loaded.named_buffers() if n.endswith("correction_bias")]
    assert found and all(f.dtype == torch.float32 for f in found)
    assert all(torch.equal(f, w) for f, w in zip(found, wanted, strict=True)) and found[0].any()


def test_experts_out_of_the_probes_reach_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    config = tiny_config("qwen3_moe", mlp_only_layers=[0, 1], num_hidden_layers=3)
    monkeypatch.setattr(probing, "_tiny_experts", lambda fields: {"mlp_only_layers": [0, 1]})
    with pytest.raises(UnsupportedModelError, match="did not reach its experts"):
        shape_of(config)


@pytest.mark.parametrize("place", [Placement.RAM, Placement.DISK])
def test_in_reference_mode_kept_graphs_outlive_the_ring_slot(tmp_path: Path, place: Placement) -> None:
    """Unquantized experts would be views of a slot that the next layer overwrites."""
    folder = write_checkpoint(tmp_path, "qwen3_moe")
    gradients = []
    for where in (Placement.DEVICE, place):
        num_slots = 0 if where is Placement.DEVICE else 2
        plan = resident_plan(*[ActivationPolicy.KEEP] * 3, weights=(where,) * 3, num_slots=num_slots)
        decoder, lora = load_tiny(folder, NO, plan=plan)
        walk = LayerWalk(decoder, lora, plan, reference=True)
        walk.accumulate([packed_row(LENGTHS)], seed=0, step=1, num_supervised=50)
        gradients.append(lora.gradient.clone())
        decoder.close()
    assert torch.equal(*gradients)


def test_layers_without_an_mlp_of_that_name_are_not_tiled(tmp_path: Path) -> None:
    decoder, lora = load_tiny(write_checkpoint(tmp_path, "lfm2"), NO)
    gradients = []
    for tile_tokens in (None, 16):
        plan = resident_plan(*[ActivationPolicy.RECOMPUTE] * 3, mlp_tile_tokens=tile_tokens)
        lora.gradient.zero_()
        walk = LayerWalk(decoder, lora, plan, reference=False)
        walk.accumulate([packed_row(LENGTHS)], seed=0, step=1, num_supervised=50)
        gradients.append(lora.gradient.clone())
    assert torch.equal(*gradients)
