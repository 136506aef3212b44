"""The plan against the meter: predicted bytes of an optimizer step within 5 %, and never 2 % under.

The prediction knows shapes and the execution plan only; the meter knows operations only. Models are random;
those over 100M parameters have few, wide layers, so that the whole file takes a minute on one core.

On a machine with a GPU the same comparison runs there too. The allocator says two things there: what was
asked of it, which is what a plan can know, and what it gave, up to 1 MiB more for each large tensor: nothing
beside an 8B model, a tenth of these. The first is compared, both are printed. Managed memory does not come
from the allocator, and is added.
"""

from __future__ import annotations

import gc
import json
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from mxfp4_bases import write_mxfp4_base
from tiny_models import packed_row, quantize_with_head, tiny_config
from transformers import AutoModelForCausalLM

from qlora_train.device.compute import ComputeDevice
from qlora_train.device.memory_tracker import MemoryTracker
from qlora_train.kernels.on_device import find_device
from qlora_train.micro_batch import MicroBatch
from qlora_train.model.base import read_config
from qlora_train.model.lora_parameters import LoraParameters
from qlora_train.model.packed_tokens import PackedTokens
from qlora_train.plan.model_shape import ModelShape, shape_of
from qlora_train.plan.planned_walk import evaluation_peak, step_bytes
from qlora_train.plan.workload import Workload
from qlora_train.quant.formats import Quantization
from qlora_train.quant.quantize import quantize
from qlora_train.walk.evaluate import loss_sum
from qlora_train.walk.layer_walk import LayerWalk
from qlora_train.walk.optimizer import FlatOptimizer
from qlora_train.weights.execution_plan import ActivationPolicy, ExecutionPlan, Placement
from qlora_train.weights.load import load_base

MAX_OVER, MAX_UNDER = 0.05, 0.02
MAX_OFF_IN_REFERENCE = 0.10  # the library's own operations: replayed less closely
DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]

WIDE = {"hidden_size": 768, "num_attention_heads": 12, "num_key_value_heads": 4}
SHAPES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama-4m": ("llama", {"hidden_size": 256, "intermediate_size": 688, "vocab_size": 1000}),
    "llama-tied-3m": (
        "llama",
        {"hidden_size": 192, "intermediate_size": 512, "vocab_size": 5000, "tie_word_embeddings": True},
    ),
    "llama-wide-head": ("llama", {"hidden_size": 192, "intermediate_size": 512, "vocab_size": 5001}),
    "qwen3-3m": ("qwen3", {"hidden_size": 192, "intermediate_size": 576, "vocab_size": 3000, "head_dim": 64}),
    "gpt_oss-mxfp4": ("gpt_oss", {"hidden_size": 256, "intermediate_size": 320, "vocab_size": 1000}),
    "phi3-4m": ("phi3", {"hidden_size": 256, "intermediate_size": 640, "vocab_size": 500}),
    "gemma-3m": ("gemma", {"hidden_size": 192, "intermediate_size": 768, "vocab_size": 700, "head_dim": 48}),
    **{
        family: (family, {"hidden_size": 256, "intermediate_size": 688, "vocab_size": 1000, "head_dim": 64})
        for family in (
            "ministral",
            "gemma3_text",
            "glm",
            "glm4",
            "exaone4",
            "seed_oss",
            "hunyuan_v1_dense",
            "helium",
        )
    },
    "llama-118m": (
        "llama",
        {"hidden_size": 2048, "intermediate_size": 5632, "vocab_size": 2048, "num_hidden_layers": 2}
        | {"num_attention_heads": 16, "num_key_value_heads": 4},
    ),
    "llama-tied-132m": (
        "llama",
        {"hidden_size": 1536, "intermediate_size": 4096, "vocab_size": 50000, "num_hidden_layers": 2}
        | {"num_attention_heads": 12, "num_key_value_heads": 4, "tie_word_embeddings": True},
    ),
}
SHAPES |= {
    family: (family, {"hidden_size": 256, "intermediate_size": 688, "vocab_size": 1000})
    for family in ("olmo2", "olmo3", "cohere2", "granite")
}
SHAPES |= {
    f"{family}-large": (family, WIDE | {"intermediate_size": intermediate, "vocab_size": 2048} | more)
    for family, intermediate, more in (
        ("gemma2", 4096, {"head_dim": 128, "query_pre_attn_scalar": 128, "num_hidden_layers": 4}),
        ("apertus", 6144, {"head_dim": 128, "num_hidden_layers": 4}),
        ("cohere", 4096, {"num_hidden_layers": 4}),
        ("olmo", 4096, {"num_hidden_layers": 4}),
        ("starcoder2", 6144, {"num_hidden_layers": 4}),
    )
}
"""The largest over 100M parameters."""
KEEP, RECOMPUTE, OFFLOAD = ActivationPolicy.KEEP, ActivationPolicy.RECOMPUTE, ActivationPolicy.OFFLOAD
DEVICE, RAM, DISK = Placement.DEVICE, Placement.RAM, Placement.DISK


@dataclass(frozen=True)
class Case:
    """One combination. weights: of layers, in turn; matrices: embedding and head. activations: in turn.
    quantizes_head: the checkpoint is quantized already, its head too."""

    shape: str
    quantization: Quantization = Quantization("nf4", double_quant=True)
    dtype: torch.dtype = torch.bfloat16
    weights: tuple[Placement, ...] = (DEVICE,)
    matrices: tuple[Placement, Placement] = (DEVICE, DEVICE)
    activations: tuple[ActivationPolicy, ...] = (KEEP,)
    documents: tuple[int, ...] = (128,)
    num_micro_batches: int = 1
    rank: int = 8
    dropout: float = 0.0
    optimizer: str = "adamw_8bit"
    reference: bool = False
    quantizes_head: bool = False
    plan: dict[str, Any] = field(default_factory=dict, hash=False)

    def execution(self, num_layers: int) -> ExecutionPlan:
        weights = _in_turn(self.weights, num_layers)
        streams = any(place is not DEVICE for place in (*weights, self.matrices[1]))
        options: dict[str, Any] = {
            "num_groups": 1,
            "inputs": DEVICE,
            "hold_dequantized": False,
            "mlp_tile_tokens": None,
            "loss_tokens": 64,
            "head_tile_rows": 1024,
            "num_slots": 2 if streams else 0,
        }
        activations = _in_turn(self.activations, num_layers)
        return ExecutionPlan(weights, activations, *self.matrices, **(options | self.plan))


def _in_turn(values: tuple[Any, ...], number: int) -> tuple[Any, ...]:
    return (values * number)[:number]


CASES = {
    "keep": Case("llama-4m"),
    "keep-fp32": Case(
        "llama-4m", dtype=torch.float32, quantization=Quantization("fp4", True), documents=(96, 96)
    ),
    "recompute": Case("llama-4m", activations=(RECOMPUTE,), num_micro_batches=3, documents=(200,)),
    "recompute-dropout": Case("llama-4m", activations=(RECOMPUTE,), dropout=0.1, documents=(64, 32, 17)),
    "half-kept": Case(
        "llama-4m", activations=(RECOMPUTE, KEEP), num_micro_batches=2, quantization=Quantization("nf4")
    ),
    "keep-dropout-tied": Case("llama-tied-3m", dropout=0.05, num_micro_batches=2, dtype=torch.float32),
    "int8": Case(
        "llama-tied-3m", quantization=Quantization("int8"), activations=(RECOMPUTE,), num_micro_batches=4
    ),
    "dequantized": Case(
        "llama-4m", quantization=Quantization("none"), optimizer="adamw", rank=64, documents=(16,)
    ),
    "held": Case("llama-4m", num_micro_batches=3, activations=(RECOMPUTE,), plan={"hold_dequantized": True}),
    "held-kept": Case("llama-4m", num_micro_batches=2, plan={"hold_dequantized": True}, documents=(32,)),
    "qwen3": Case("qwen3-3m", activations=(KEEP, RECOMPUTE), documents=(100, 28)),
    "mxfp4": Case("gpt_oss-mxfp4", activations=(KEEP, RECOMPUTE)),
    "mxfp4-reference": Case("gpt_oss-mxfp4", reference=True, quantization=Quantization("none")),
    "phi3": Case("phi3-4m", activations=(RECOMPUTE, KEEP)),
    "gemma": Case("gemma-3m", activations=(RECOMPUTE,), documents=(256,)),
    "ministral": Case("ministral", activations=(KEEP, RECOMPUTE), num_micro_batches=2),
    "gemma3": Case("gemma3_text", activations=(RECOMPUTE, KEEP), documents=(300,)),
    "glm": Case("glm", activations=(KEEP, RECOMPUTE), documents=(64, 32, 17), dropout=0.1),
    "glm4": Case("glm4", activations=(RECOMPUTE, KEEP), documents=(300,)),
    "exaone4": Case("exaone4", activations=(RECOMPUTE, KEEP), documents=(300,)),
    "seed-oss": Case("seed_oss", activations=(RECOMPUTE,), num_micro_batches=2),
    "hunyuan": Case("hunyuan_v1_dense", documents=(100, 28)),
    "helium": Case("helium", activations=(RECOMPUTE, KEEP)),
    "groups": Case("llama-4m", num_micro_batches=4, plan={"num_groups": 2}),
    "mlp-tiles": Case(
        "llama-4m", activations=(RECOMPUTE,), documents=(512,), plan={"mlp_tile_tokens": 100}, dropout=0.1
    ),
    "offload": Case("llama-4m", activations=(OFFLOAD,), num_micro_batches=2, documents=(160,)),
    "inputs-in-ram": Case("llama-4m", activations=(RECOMPUTE,), num_micro_batches=4, plan={"inputs": RAM}),
    "streamed": Case("llama-4m", weights=(RAM,), matrices=(RAM, RAM), activations=(RECOMPUTE,)),
    "partly-streamed": Case(
        "llama-tied-3m", weights=(DISK, DEVICE), matrices=(DISK, DISK), num_micro_batches=2
    ),
    "three-slots": Case("llama-4m", weights=(DISK, DISK, DEVICE), num_micro_batches=2, plan={"num_slots": 3}),
    "everything": Case(
        "qwen3-3m",
        quantization=Quantization("int8"),
        weights=(RAM, DEVICE),
        matrices=(DISK, RAM),
        activations=(RECOMPUTE, KEEP, RECOMPUTE),
        num_micro_batches=5,
        documents=(70, 30),
        dropout=0.1,
        optimizer="adamw",
        plan={"num_groups": 2, "hold_dequantized": True, "mlp_tile_tokens": 64, "inputs": RAM},
    ),
    "reference": Case("llama-4m", reference=True, documents=(96,), activations=(KEEP, RECOMPUTE)),
    "reference-fp32": Case("llama-tied-3m", reference=True, dtype=torch.float32, dropout=0.1),
    "head-nf4": Case("llama-wide-head", quantizes_head=True, num_micro_batches=2),
    "head-fp4-fp32": Case(
        "llama-wide-head",
        quantizes_head=True,
        quantization=Quantization("fp4"),
        dtype=torch.float32,
        activations=(RECOMPUTE,),
    ),
    "head-int8": Case(
        "llama-wide-head", quantizes_head=True, quantization=Quantization("int8"), documents=(300,)
    ),
    "head-nf4-in-ram": Case(
        "llama-wide-head", quantizes_head=True, matrices=(RAM, RAM), activations=(RECOMPUTE,), documents=(32,)
    ),
    "head-int8-on-disk": Case(
        "llama-wide-head",
        quantizes_head=True,
        quantization=Quantization("int8"),
        weights=(DISK,),
        matrices=(DISK, DISK),
    ),
    "head-one-tile": Case(
        "llama-wide-head", quantizes_head=True, plan={"head_tile_rows": 8192}, documents=(16,)
    ),
    "head-reference": Case("llama-wide-head", quantizes_head=True, reference=True, documents=(16,)),
    "118m-keep": Case("llama-118m", rank=16, optimizer="paged_adamw_32bit"),
    "118m-streamed": Case(
        "llama-118m", weights=(RAM,), matrices=(RAM, RAM), activations=(RECOMPUTE,), num_micro_batches=2
    ),
    "132m-tied": Case("llama-tied-132m", activations=(RECOMPUTE,), plan={"head_tile_rows": 8192}),
    "olmo2": Case("olmo2", activations=(RECOMPUTE, KEEP), documents=(100, 28)),
    "olmo3": Case("olmo3", activations=(KEEP, RECOMPUTE), dtype=torch.float32),
    "cohere2": Case("cohere2", activations=(RECOMPUTE, KEEP), dtype=torch.float32, num_micro_batches=2),
    "granite": Case("granite", activations=(KEEP, RECOMPUTE), dtype=torch.float32),
    **{
        f"{family}-large": Case(
            f"{family}-large", dtype=torch.float32, activations=(RECOMPUTE, KEEP), documents=documents
        )
        for family, documents in (
            ("gemma2", (700,)),
            ("apertus", (96, 32)),
            ("cohere", (128,)),
            ("olmo", (128,)),
            ("starcoder2", (100,)),
        )
    },
}


@dataclass(frozen=True)
class Peaks:
    """Bytes of a step and of an evaluation."""

    step: int
    evaluation: int


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """Name of a shape, how it is quantized with its head or None -> folder with a random checkpoint, made at
    its first use."""
    root = tmp_path_factory.mktemp("shapes")

    @cache
    def folder(name: str, quantization: Quantization | None) -> Path:
        if quantization is not None:
            return quantize_with_head(folder(name, None), root / f"{name} {quantization}", quantization)
        family, sizes = SHAPES[name]
        if name.endswith("-mxfp4"):
            return write_mxfp4_base(root / name, **sizes)
        config = tiny_config(family, **({"max_position_embeddings": 2048} | sizes))
        torch.manual_seed(0)
        with torch.no_grad():
            model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
            for parameter in model.parameters():
                if parameter.dim() == 1:
                    parameter.uniform_(0.5, 1.5)  # norms of ones round alike in every family
        model.save_pretrained(root / name)
        return root / name

    return folder


def measured_bytes(case: Case, folder: Path, device: ComputeDevice) -> Peaks:
    """Peak of the second optimizer step, and of an evaluation after it, with everything that lives through
    them."""
    if case.quantization.is_4bit:
        quantize(
            [torch.zeros(64, 64)], (64, 64), case.quantization
        )  # the quantizer's look-up table is made once
    rows = [packed_row(list(case.documents), seed=k) for k in range(case.num_micro_batches)]
    gc.collect()
    with MemoryTracker(device) as meter:
        peak_bytes = _peak_reader(meter, device)
        tokens = [_on(device.torch, row) for row in rows]
        num_layers = json.loads((folder / "config.json").read_text())["num_hidden_layers"]
        plan = case.execution(num_layers)
        cache_folder = folder.parent / "quantized"
        decoder = load_base(folder, case.quantization, case.dtype, device, plan=plan, cache=cache_folder)
        found = shape_of(read_config(folder)).probed
        decoder.skippable = found.skippable
        if not case.reference:
            decoder.fuse(norms=found.fuses_norms, mlps=found.fuses_mlps, qkv=found.fuses_qkv)
        lora = LoraParameters(
            decoder.linears,
            rank=case.rank,
            scaling=2.0,
            dropout=case.dropout,
            seed=0,
            dtype=case.dtype,
            device=device.torch,
        )
        optimizer = FlatOptimizer(case.optimizer, lora, device, lora_b_lr_ratio=1.0, weight_decay=0.0)
        walk = LayerWalk(decoder, lora, plan, reference=case.reference)
        for step in (1, 2):
            meter.reset_peak()
            lora.gradient.zero_()
            walk.accumulate(tokens, seed=0, step=step, num_supervised=100)
            optimizer.step(1e-4)
        step_bytes = peak_bytes() + optimizer.managed_bytes
        meter.reset_peak()
        group_size = -(-case.num_micro_batches // plan.num_groups)
        loss_sum(decoder, tokens, group_size=group_size, loss_tokens=plan.loss_tokens)
        evaluation_bytes = peak_bytes() + optimizer.managed_bytes
    if plan.streams:
        decoder.weights.close()  # type: ignore[attr-defined]
    return Peaks(step_bytes, evaluation_bytes)


def _peak_reader(meter: MemoryTracker, device: ComputeDevice) -> Callable[[], int]:
    """Reads the bytes of tensors at the most since the meter's last reset; see the module docstring."""
    if not device.is_accelerator:
        return lambda: meter.peak_bytes

    def requested(when: str) -> int:
        return device.memory_stats()[f"requested_bytes.all.{when}"]

    before = requested("current")

    def read() -> int:
        print(
            f"the allocator gave {meter.peak_bytes:,} at the most, {requested('peak') - before:,} were asked"
        )
        return requested("peak") - before

    return read


def _on(device: torch.device, tokens: PackedTokens) -> PackedTokens:
    host = MicroBatch(
        token_ids=tokens.ids.host,
        position_ids=tokens.position_ids[0].numpy(),
        labels=tokens.labels.numpy(),
        cu_seqlens=np.asarray(tokens.documents.boundaries),
        row_ids=tokens.rows.numpy(),
        token_offsets=tokens.offsets.numpy(),
    )
    return PackedTokens.from_host(host, device)


def workload_of(case: Case, shape: ModelShape, device: str) -> Workload:
    return Workload(
        shape=shape,
        quantization=case.quantization,
        dtype=case.dtype,
        lora_ranks=tuple((path, case.rank) for path in shape.linear_shapes),
        dropout=case.dropout > 0,
        documents=case.documents,
        num_supervised=sum(case.documents) - 3 * len(case.documents),
        num_micro_batches=case.num_micro_batches,
        optimizer=case.optimizer,
        reference=case.reference,
        target=find_device(torch.device(device)).description,
    )


@pytest.mark.parametrize("device_name", DEVICES)
@pytest.mark.parametrize("name", CASES)
def test_plan_matches_meter(name: str, device_name: str, checkpoints: Any) -> None:
    if device_name == "cuda" and not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    case = CASES[name]
    folder = checkpoints(case.shape, case.quantization if case.quantizes_head else None)
    shape = shape_of(read_config(folder))
    workload, plan = workload_of(case, shape, device_name), case.execution(shape.num_layers)
    measured = measured_bytes(case, folder, find_device(torch.device(device_name)))
    for phase, by_cause, measured_of_phase in (
        ("step", step_bytes(workload, plan).device, measured.step),
        ("evaluation", evaluation_peak(workload, plan), measured.evaluation),
    ):
        predicted = sum(by_cause.values())
        deviation = predicted / measured_of_phase - 1
        print(f"{name} {phase}: predicted {predicted:,}, measured {measured_of_phase:,}, {deviation:+.2%}")
        under, over = (MAX_OFF_IN_REFERENCE,) * 2 if case.reference else (MAX_UNDER, MAX_OVER)
        assert -under < deviation < over, (phase, deviation, by_cause)
