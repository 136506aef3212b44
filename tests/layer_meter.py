"""One decoder layer's bytes under a meter, on the CPU and on the meta device; small configs of families."""

from __future__ import annotations

import gc
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from transformers import CONFIG_MAPPING, PretrainedConfig

from qlora_train.device.compute import THE_CPU
from qlora_train.device.description import CPU, DeviceDescription
from qlora_train.device.memory_tracker import StorageMeter
from qlora_train.model.base import MetaModel
from qlora_train.model.decoder import FrozenDecoder
from qlora_train.model.lora_parameters import LoraParameters
from qlora_train.model.packed_tokens import PackedTokens
from qlora_train.model.vocab_matrix import ResidentMatrix
from qlora_train.model.weight_store import ResidentWeights
from qlora_train.plan.model_shape import shape_of
from qlora_train.plan.workload import Workload
from qlora_train.quant.formats import Quantization
from qlora_train.quant.weight import QuantizedWeight, quantized_layout

RANK = 4


@dataclass(frozen=True)
class LayerPeaks:
    """At the most, above the layer's input (and, going back, the gradient of its output). saved: what a kept
    graph holds besides input and output."""

    forward: int
    saved: int
    kept_forward: int
    kept_backward: int
    recompute: int


def measured(
    decoder: FrozenDecoder,
    index: int,
    tokens: PackedTokens,
    new_meter: Callable[[], StorageMeter] = lambda: StorageMeter("cpu"),
) -> LayerPeaks:
    """Layer `index`, run for real."""
    x, arguments = decoder.embed_packed(tokens)
    gradient = torch.zeros_like(x)

    def forward(leaf: torch.Tensor) -> torch.Tensor:
        return FrozenDecoder.run_layer(decoder, index, leaf, arguments[index])

    def peak_of(run: Callable[[], None]) -> int:
        with new_meter() as meter:
            run()
        return meter.peak_bytes

    def without_graph() -> None:
        as_in_the_first_step(decoder)
        with torch.no_grad():
            forward(x)

    def recompute() -> None:
        with decoder.running_again(index):
            y = forward(x.detach().requires_grad_())
        y.backward(gradient)

    without_graph()  # whatever is made once
    gc.collect()
    as_in_the_first_step(decoder)
    with new_meter() as meter:
        y = forward(x.detach().requires_grad_())
        kept_forward, live = meter.peak_bytes, meter.live_bytes
        meter.reset_peak()
        y.backward(gradient)
        kept_backward = meter.peak_bytes - live
    return LayerPeaks(
        peak_of(without_graph), live - y.nbytes, kept_forward, kept_backward, peak_of(recompute)
    )


def as_in_the_first_step(decoder: FrozenDecoder) -> None:
    """With DoRA, the next forward pass computes every linear's row norms."""
    for linear in decoder.linears.values():
        if linear.lora is not None and linear.lora.magnitude is not None:
            linear.lora.magnitude.is_measured, linear.lora.magnitude.is_stale = False, True


def workload_for(
    config: PretrainedConfig,
    dtype: torch.dtype = torch.bfloat16,
    documents: tuple[int, ...] = (200,),
    quantization: Quantization = Quantization("none"),  # noqa: B008  # frozen
    target: DeviceDescription = CPU,
    **changes: Any,
) -> Workload:
    """All linears with factors, all tokens supervised, one micro-batch."""
    shape = shape_of(config)
    options: dict[str, Any] = {
        "lora_ranks": tuple((path, RANK) for path in shape.linear_shapes),
        "num_supervised": sum(documents),
        "optimizer": "adamw_8bit",
    }
    return Workload(
        shape=shape,
        quantization=quantization,
        dtype=dtype,
        documents=documents,
        target=target,
        **(options | changes),
    )


def cpu_model(workload: Workload) -> tuple[FrozenDecoder, LoraParameters]:
    """The workload's model on the CPU, full of zeros."""
    shape, dtype, quantization = workload.shape, workload.dtype, workload.quantization
    meta_model = MetaModel(shape.config, dtype)
    source = ResidentWeights(meta_model.layouts(quantization), THE_CPU.description.dequantize_kernel)
    for index, path in enumerate(meta_model.layer_paths):
        for name, size in dict(meta_model.layer_shapes(index).items()).items():
            layout = quantized_layout(quantization, size, dtype)
            tensors = {key: torch.zeros(of, dtype=kind) for key, (kind, of) in layout.items()}
            source.quantized[f"{path}.{name}"] = QuantizedWeight(quantization, size, tensors)
    plain = {
        name: torch.ones(size, dtype=meta_model.plain_dtype(name))
        for name, size in meta_model.plain_shapes.items()
    }
    matrix = ResidentMatrix(torch.zeros(meta_model.matrix_shape, dtype=dtype), 40)
    decoder = meta_model.materialize(source, plain, matrix, matrix, THE_CPU)
    decoder.skippable, found = shape.probed.skippable, shape.probed
    if not workload.reference:
        decoder.fuse(norms=found.fuses_norms, mlps=found.fuses_mlps, qkv=found.fuses_qkv)
    ranks = dict(workload.lora_ranks)
    lora = LoraParameters(
        {path: decoder.adaptable[path] for path in ranks}, rank=ranks, scaling=1.0, seed=0, dtype=dtype,
        dropout=0.5 if workload.dropout else 0.0, device="cpu", use_dora=workload.use_dora,
    )  # fmt: skip
    return decoder, lora


def small_config(family: str, num_layers: int = 2, **changes: Any) -> PretrainedConfig:
    """A config of a family with 128 numbers a token, sliding windows of 40 tokens, layers of all kinds."""
    default = CONFIG_MAPPING[family]()
    known = default.to_dict()
    options: dict[str, Any] = {
        "vocab_size": 96, "hidden_size": 128, "intermediate_size": 224, "num_hidden_layers": num_layers,
        "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 1024,
        "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
    }  # fmt: skip
    heads = default.num_attention_heads
    if heads == (getattr(default, "num_key_value_heads", None) or heads):
        options["num_key_value_heads"] = 4
    if "head_dim" in known:
        options["head_dim"] = 32
    if family == "minicpm3":
        options |= {"q_lora_rank": 48, "kv_lora_rank": 32, "qk_nope_head_dim": 32, "qk_rope_head_dim": 16}
        options |= {"v_head_dim": 32, "num_key_value_heads": 4}
        options.pop("head_dim", None)
    if family == "moshi":
        options["ffn_dim"] = 448
    if family == "phi4_multimodal":
        options |= {"vision_config": {"num_hidden_layers": 1}, "audio_config": {"num_blocks": 1}}
    if known.get("sliding_window") is not None:
        options["sliding_window"] = 40
    if "use_sliding_window" in known:
        options |= {"use_sliding_window": True, "sliding_window": 40, "max_window_layers": num_layers // 2}
    return CONFIG_MAPPING[family](**(options | changes))
