"""The paths a step takes on a GPU: the planner chooses as the model does, and counts a layer's bytes there.

Without a GPU the bytes are counted on the CPU with stand-ins (gpu_stand_ins.py) in the places of the kernels:
the layer, autograd, liger-kernel's Python and the meter are real.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import replace
from functools import cache
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from gpu_stand_ins import flash_like, idle_flash_kernels, idle_liger, put_in_norms
from layer_meter import RANK, measured, planned
from tiny_models import load_tiny, tiny_config, write_checkpoint
from torch.nn.attention.varlen import varlen_attn

from qlora_train.device import description as target
from qlora_train.device.description import CPU, DeviceDescription, planned_gpu, varlen_of_version
from qlora_train.kernels.on_device import find_device
from qlora_train.kernels.varlen_attention import (
    VarlenAttention,
)
from qlora_train.memory.plan import ghost_flash
from qlora_train.memory.plan.ghost import Ledger, backward
from qlora_train.memory.plan.ghost_attention import AttentionRule
from qlora_train.memory.plan.ghost_attention import packed_attention as ghost_attention
from qlora_train.memory.plan.model_shape import shape_from_config
from qlora_train.model.attention import AttentionKernels, DocumentLayout, packed_attention
from qlora_train.model.fused import fuse_mlps
from qlora_train.model.quantize import Packing

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
CAPABILITIES = ((7, 5), (8, 0), (8, 6), (8, 9), (9, 0), (12, 0))
COMMON = frozenset({"query", "key", "value", "cu_seq_q", "cu_seq_k", "max_q", "max_k"})
PARAMETERS = {
    "2.10.0": COMMON | {"is_causal"},
    "2.11.1+cu128": COMMON | {"scale", "window_size"},
    "2.12.0": COMMON | {"scale", "window_size", "enable_gqa"},
    "3.0.0a0": COMMON | {"scale", "window_size", "enable_gqa"},
}
AMPERE = DeviceDescription("cuda", (8, 6), 28, "grouped heads", has_liger=True, cublas_workspace=None)


def test_a_cpu_has_no_flash_and_no_workspaces() -> None:
    assert not CPU.flash_serves(2, 64) and CPU.workspace_bytes(deterministic=True) == 0


@pytest.mark.parametrize(
    ("version", "varlen"),
    [
        ("2.10.0", "none"),
        ("2.11.0+cu130", "grouped heads"),
        ("2.13.0+cpu", "grouped heads"),
        ("3.0.0a0", "grouped heads"),
    ],
)
def test_varlen_of_a_version_that_is_only_planned_for(version, varlen) -> None:
    assert varlen_of_version(version) == varlen


@pytest.mark.parametrize(
    ("name", "capability", "expected"),
    [
        ("NVIDIA GeForce RTX 4090", (8, 9), ((8, 9), 128)),
        ("NVIDIA H100 80GB HBM3", (9, 0), ((9, 0), 132)),
        ("Tesla T4", None, ((7, 5), 40)),
        ("NVIDIA L40S", (8, 9), ((8, 9), target.MOST_MULTIPROCESSORS)),  # no L4
        ("NVIDIA Something New", (13, 0), ((13, 0), target.MOST_MULTIPROCESSORS)),
        (None, None, ((8, 6), 38)),
    ],
)
def test_a_card_without_torch(name, capability, expected) -> None:
    found = planned_gpu(name, capability)
    assert (found.capability, found.num_multiprocessors) == expected


@pytest.mark.parametrize(
    ("capability", "config", "deterministic", "expected_mib"),
    [
        ((8, 6), None, False, 2 * (8 + 1 / 8)),
        ((8, 6), None, True, 64),
        ((9, 0), None, False, 64),
        ((12, 0), None, False, 64),
        ((8, 6), ":16:8", True, 2 / 8),
        ((9, 0), ":4096:2:16:8", False, 2 * (8 + 1 / 8)),
        ((8, 6), "nonsense", False, 2 * (8 + 1 / 8)),
    ],
)
def test_workspaces(capability, config, deterministic, expected_mib) -> None:
    planned = replace(AMPERE, capability=capability, cublas_workspace=config)
    assert planned.workspace_bytes(deterministic=deterministic) == expected_mib * 2**20


def test_what_train_sets_is_what_is_planned(monkeypatch: pytest.MonkeyPatch) -> None:
    from qlora_train.recipe import Recipe
    from qlora_train.train.setup import make_accelerator

    monkeypatch.setenv(target.WORKSPACE_VARIABLE, "")
    monkeypatch.delenv(target.WORKSPACE_VARIABLE)
    monkeypatch.setattr(torch.utils.deterministic, "fill_uninitialized_memory", True)
    sections = {"model": {"base": "x"}, "data": {"train": "x"}, "training": {"deterministic": True}}
    try:
        make_accelerator(Recipe.from_dict(sections))
        assert os.environ[target.WORKSPACE_VARIABLE] == target.DETERMINISTIC_WORKSPACE
    finally:
        torch.use_deterministic_algorithms(False)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_workspaces_of_this_gpu() -> None:
    """In a fresh process: they are made once."""
    import subprocess
    import sys

    program = (
        "from qlora_train.kernels.on_device import find_device\n"
        "from qlora_train.device.context import make_workspaces\n"
        "device = find_device(); make_workspaces(device)\n"
        "print(device.allocated_bytes)"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert int(done.stdout) <= find_device().description.workspace_bytes(deterministic=False)


@pytest.mark.parametrize("kv_heads", [2, 8])
def test_what_torchs_varlen_saves(kv_heads: int) -> None:
    q, k, v = (torch.randn(1, n, 96, 16).to(torch.bfloat16).requires_grad_() for n in (8, kv_heads, kv_heads))
    saved: dict[int, int] = {}

    def note(t: torch.Tensor) -> torch.Tensor:
        saved[t.untyped_storage().data_ptr()] = t.untyped_storage().nbytes()
        return t

    layout = DocumentLayout.of(np.array([0, 60, 96]), "cpu")
    chosen = AttentionKernels(AMPERE, VarlenAttention(varlen_attn, AMPERE), blocks_documents=False)
    with idle_flash_kernels(), torch.autograd.graph.saved_tensors_hooks(note, lambda t: t):
        out, _ = packed_attention(
            torch.nn.Identity(), q, k, v, None, documents=layout, attention_kernels=chosen
        )
        out.sum().backward()
    ledger = Ledger()
    ghosts = [ledger.tensor(t.shape, 2).leaf() for t in (q, k, v)]
    result = ghost_attention(*ghosts, rule((60, 36)))
    boundaries_and_seeds = 2 * 3 * 4 // 2 + 2 * 8
    assert ledger.live_bytes + boundaries_and_seeds == sum(saved.values())
    del result


def rule(documents: tuple[int, ...], **changes: Any) -> AttentionRule:
    plain = AttentionRule(
        documents, window=None, has_softcap=False, heads_outside=False, reference=False, target=AMPERE,
        deterministic=False, most_documents=len(documents),
    )  # fmt: skip
    return replace(plain, **changes)


@pytest.mark.parametrize(
    ("deterministic", "documents", "most", "num_sums", "rows"),
    [
        (False, (150, 150), 2, 1, 300 + 2 * 128),
        (False, (150, 150), 32, 1, 300 + 32 * 128),
        (True, (150, 150), 33, 1, 300 + 33 * 128),
        (True, (300,), 1, 4, 300 + 128),
        (True, (300,), 5, 4, 300 + 128),
        (True, (150, 150), 3, 2, 300 + 3 * 128),  # more than with the fewest or with the four that one is for
        (True, (150, 150), 4, 2, 300 + 3 * 128),
    ],
)
def test_sums_of_a_kernel_of_variable_length(deterministic, documents, most, num_sums, rows) -> None:
    """The most that any number of documents takes: gaps of many, or sums side by side of few."""
    target_here = replace(AMPERE, num_multiprocessors=128)
    ledger = Ledger()
    q, k, v = (ledger.tensor((1, 32, 300, 64), 2).leaf() for _ in range(3))
    where = {"target": target_here, "deterministic": deterministic, "most_documents": most}
    out = ghost_attention(q, k, v, rule(documents, **where))
    gradient = out.like()
    ledger.restart()
    backward(out, gradient)
    assert ledger.peak[ghost_flash.SCRATCH] == num_sums * rows * 32 * 64 * 4 + rows * 32 * 4


@pytest.mark.parametrize("num_keys", [8, 32])
@pytest.mark.parametrize(
    ("itemsize", "window", "capability", "deterministic"),
    [
        (2, None, (8, 6), False),
        (2, None, (8, 6), True),
        (4, None, (8, 6), True),
        (2, None, (7, 5), False),
        (4, None, (7, 5), False),
        (2, 40, (8, 6), False),
    ],
)
def test_scratch_going_back_by_document(num_keys, itemsize, window, capability, deterministic) -> None:
    """Three documents padded to 112 tokens, 32 heads of 72 numbers, by hand."""
    target_here = replace(AMPERE, capability=capability, varlen="none", num_multiprocessors=200)
    where = {"target": target_here, "deterministic": deterministic, "window": window}
    ledger = Ledger()
    q, k, v = (ledger.tensor((1, n, 300, 72), itemsize).leaf() for n in (32, num_keys, num_keys))
    out = ghost_attention(q, k, v, rule((100, 100, 100), **where))
    gradient = out.like()
    ledger.restart()
    backward(out, gradient)
    found = ledger.peak.get(ghost_flash.SCRATCH, 0)
    if itemsize == 2 and window is None and capability >= (8, 0):
        sums = 3 * 128 * 32 * 96 * 4 * (3 if deterministic else 1)  # 200 over 3 x 32
        expanded = 2 * 3 * 112 * 32 * 72 * 2 if num_keys < 32 else 0
        assert found == sums + 3 * 128 * 32 * 4 + expanded
    elif window is None:
        sums = 3 * 3 * 32 * 128 * 128 * 4 if itemsize == 2 else 0
        assert found == 3 * 32 * 112 * 4 + sums
    else:
        assert found > 0


# A layer's bytes, counted.

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


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """A name in LAYERS -> a folder with random weights, made at its first use."""
    root = tmp_path_factory.mktemp("layers")

    @cache
    def folder(name: str) -> Path:
        family, changes = LAYERS[name]
        return write_checkpoint(root / name, family, **(SIZES | changes))

    return folder


CASES = [*product(LAYERS, ([96], [50, 7, 33, 1]), (False,)), ("llama", [96], True), ("qwen3", [50, 7], True)]


@pytest.mark.parametrize(("name", "documents", "deterministic"), CASES, ids=str)
def test_a_layer_on_a_gpu(name, documents, deterministic, checkpoints, monkeypatch) -> None:
    family, changes = LAYERS[name]
    shape = shape_from_config(tiny_config(family, **(SIZES | changes)).to_dict())
    decoder, _ = load_tiny(checkpoints(name), Packing("none"), torch.bfloat16, rank=RANK)
    attend = flash_like(AMPERE.num_multiprocessors, deterministic=deterministic)
    decoder.attention_kernels = AttentionKernels(
        AMPERE, VarlenAttention(attend, AMPERE), blocks_documents=False
    )
    liger = idle_liger(monkeypatch)
    put_in_norms(decoder.layers, liger)
    fuse_mlps(decoder.layers, liger)
    expected = measured(decoder, 1, documents)
    assert planned(shape, 1, documents, 2, AMPERE, deterministic=deterministic) == expected
