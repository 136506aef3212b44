"""A layer's bytes on a GPU: planned without one, and counted on the CPU with stand-ins (gpu_stand_ins.py) in
the places of the kernels, where the layer, autograd, liger-kernel's Python and the meter are real."""

from __future__ import annotations

from dataclasses import replace
from itertools import product
from typing import Any

import pytest
from gpu_stand_ins import flash_like, idle_liger, put_in_norms
from layer_meter import cpu_model, measured, workload_for
from tiny_models import packed_row, tiny_config

from qlora_train.device.description import CPU, DeviceDescription
from qlora_train.kernels.varlen_attention import VarlenAttention
from qlora_train.model.attention import AttentionKernels
from qlora_train.model.fused import fuse_mlps
from qlora_train.model.shared_input import fuse_qkv
from qlora_train.plan.planned_model import PlannedModel

AMPERE = DeviceDescription("cuda", (8, 6), 28, "grouped heads", has_liger=True, cublas_workspace=None)
LAYERS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("llama", {"num_key_value_heads": 2}),
    "no groups": ("llama", {"num_key_value_heads": 4}),
    "qwen3": ("qwen3", {"head_dim": 40}),
    "mistral": ("mistral", {"sliding_window": 33}),
    "gemma": ("gemma", {"head_dim": 32}),
    "gemma3_text": ("gemma3_text", {"head_dim": 16, "layer_types": ["sliding_attention"] * 2}),
    "exaone4": ("exaone4", {"head_dim": 32}),
    "hunyuan": ("hunyuan_v1_dense", {"head_dim": 16}),
}
SIZES = {"hidden_size": 64, "intermediate_size": 112, "num_hidden_layers": 2, "max_position_embeddings": 512}
ROWS = ((96,), (50, 7, 33, 1))
CASES = [
    *product(LAYERS, ((96,), (50, 7, 33, 1)), (False,)),
    ("llama", (96,), True),
    ("qwen3", (50, 7), True),
]


@pytest.mark.parametrize(("name", "documents", "deterministic"), CASES, ids=str)
def test_a_layer_on_a_gpu(name, documents, deterministic, monkeypatch) -> None:
    family, changes = LAYERS[name]
    config = tiny_config(family, **(SIZES | changes))
    workload = workload_for(config, documents=documents, target=AMPERE, deterministic=deterministic)
    decoder, _ = cpu_model(workload_for(config, documents=documents, target=CPU, reference=True))
    attend = flash_like(AMPERE.num_multiprocessors, deterministic=deterministic)
    varlen = VarlenAttention(attend, AMPERE)
    decoder.run_with(
        replace(decoder.kernels, attention=AttentionKernels(AMPERE, varlen, blocks_documents=False))
    )
    liger, found = idle_liger(monkeypatch), workload.shape.probed
    if found.fuses_norms:
        put_in_norms(decoder.layers, liger)
    if found.fuses_mlps:
        fuse_mlps(decoder.layers, liger)
    if found.fuses_qkv:
        fuse_qkv(decoder.layers)
    expected = measured(decoder, 1, packed_row(list(documents)))
    planned = PlannedModel(workload)
    tokens = planned.micro_batch(documents, sum(documents))
    with_meter = measured(planned.decoder, 1, tokens, lambda: planned.meter(len(documents)))
    seeds = 16
    log_sums = 4 * sum(documents) * config.num_attention_heads  # torch's operation gets a gradient of them
    for what, num_bytes in vars(expected).items():
        over = getattr(with_meter, what) - num_bytes
        assert over in {n * seeds + m * log_sums for n in range(3) for m in range(2)}, (what, over)
