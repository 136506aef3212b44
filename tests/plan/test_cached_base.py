"""Room on the disk: none is asked for a quantized base that an earlier start has put there."""

from __future__ import annotations

import shutil
from collections import namedtuple
from pathlib import Path

import pytest
import torch
from tiny_models import write_checkpoint

from qlora_train.device.compute import THE_CPU as CPU
from qlora_train.device.description import CPU as TARGET
from qlora_train.model.base import MetaModel, read_config
from qlora_train.plan import host_budget
from qlora_train.plan.from_recipe import plan_recipe
from qlora_train.plan.host_bytes import QUANTIZED_BASE
from qlora_train.plan.plan import Plan
from qlora_train.quant.formats import Quantization
from qlora_train.recipe import Recipe
from qlora_train.weights.cache_key import MANIFEST, cache_root, quantized_folder
from qlora_train.weights.quantized_cache import LAYERS_FILE, open_quantized_base

QUANTIZATIONS = [Quantization("nf4", True), Quantization("fp4"), Quantization("int8"), Quantization("none")]
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


@pytest.fixture
def base(tmp_path: Path) -> Path:
    return write_checkpoint(tmp_path / "base", num_hidden_layers=2)


def planned(base: Path, quantization: Quantization, dtype: str) -> Plan:
    model = {"base": str(base), "quantization": quantization.format, "compute_dtype": dtype}
    if quantization.is_4bit:
        model["double_quant"] = quantization.double_quant
    data = {"train": "x.jsonl", "sequence_length": 64}
    recipe = Recipe.from_dict({"model": model, "data": data, "memory": {"weights": "disk"}})
    return plan_recipe(recipe, TARGET, 8 * 2**30)


def quantize(base: Path, quantization: Quantization, dtype: str) -> Path:
    meta_model = MetaModel(read_config(base), DTYPES[dtype])
    return open_quantized_base(
        cache_root(), base, meta_model, quantization, CPU.torch, lambda line: None
    ).folder


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("quantization", QUANTIZATIONS, ids=str)
def test_the_plan_looks_where_the_cache_is_written(
    base: Path, quantization: Quantization, dtype: str
) -> None:
    written = quantized_folder(cache_root(), base, quantization, dtype)
    assert QUANTIZED_BASE in planned(base, quantization, dtype).disk
    assert quantize(base, quantization, dtype) == written
    assert QUANTIZED_BASE not in planned(base, quantization, dtype).disk
    other = Quantization("nf4") if quantization != Quantization("nf4") else Quantization("int8")
    assert QUANTIZED_BASE in planned(base, other, dtype).disk


def test_a_full_disk_does_not_stop_a_second_run(base: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    quantization, dtype = Quantization("nf4", True), "float32"
    needed = planned(base, quantization, dtype).disk
    usage = namedtuple("usage", "total used free")
    free_bytes = sum(needed.values()) - needed[QUANTIZED_BASE]
    monkeypatch.setattr(host_budget.shutil, "disk_usage", lambda folder: usage(10**12, 0, free_bytes))
    assert [problem.split(":")[0] for problem in planned(base, quantization, dtype).problems] == ["disk"]
    monkeypatch.undo()
    quantize(base, quantization, dtype)
    monkeypatch.setattr(host_budget.shutil, "disk_usage", lambda folder: usage(10**12, 0, free_bytes))
    assert planned(base, quantization, dtype).fits


@pytest.mark.parametrize("damage", ["shortened", "without a file", "without a manifest", "another base"])
def test_a_damaged_cache_is_none(base: Path, damage: str) -> None:
    quantization, dtype = Quantization("nf4", True), "float32"
    folder = quantize(base, quantization, dtype)
    if damage == "shortened":
        with (folder / LAYERS_FILE).open("r+b") as file:
            file.truncate(10)
    elif damage == "without a file":
        (folder / LAYERS_FILE).unlink()
    elif damage == "without a manifest":
        (folder / MANIFEST).unlink()
    else:
        shutil.rmtree(base)
        write_checkpoint(base, num_hidden_layers=2, seed=1)
    assert QUANTIZED_BASE in planned(base, quantization, dtype).disk
