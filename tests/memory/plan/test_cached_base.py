"""Room on the disk: none is asked for a packed base that an earlier start has put there."""

from __future__ import annotations

import shutil
from collections import namedtuple
from pathlib import Path

import pytest
import torch
from tiny_models import write_checkpoint

from qlora_train.device.compute import THE_CPU as CPU
from qlora_train.device.description import CPU as TARGET
from qlora_train.memory.cache_key import MANIFEST, PackingKey, cache_root
from qlora_train.memory.cache_key import packed_folder as folder_by_key
from qlora_train.memory.packed_cache import LAYERS, open_packed_base, packed_folder
from qlora_train.memory.plan import host_bytes
from qlora_train.memory.plan.from_recipe import plan_recipe
from qlora_train.memory.plan.host_bytes import PACKED_BASE
from qlora_train.memory.plan.plan import Plan
from qlora_train.model.base import Skeleton, read_config
from qlora_train.model.quantize import Packing
from qlora_train.recipe import Recipe

PACKINGS = [Packing("nf4", True), Packing("fp4"), Packing("int8"), Packing("none")]
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


@pytest.fixture
def base(tmp_path: Path) -> Path:
    return write_checkpoint(tmp_path / "base", num_hidden_layers=2)


def planned(base: Path, packing: Packing, dtype: str) -> Plan:
    model = {"base": str(base), "quantization": packing.format, "compute_dtype": dtype}
    if packing.is_4bit:
        model["double_quant"] = packing.double_quant
    data = {"train": "x.jsonl", "sequence_length": 64}
    recipe = Recipe.from_dict({"model": model, "data": data, "memory": {"weights": "disk"}})
    return plan_recipe(recipe, TARGET, 8 * 2**30)


def pack(base: Path, packing: Packing, dtype: str) -> Path:
    skeleton = Skeleton(read_config(base), DTYPES[dtype])
    return open_packed_base(cache_root(), base, skeleton, packing, CPU.torch, lambda line: None).folder


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("packing", PACKINGS, ids=str)
def test_the_plan_looks_where_the_cache_is_written(base: Path, packing: Packing, dtype: str) -> None:
    skeleton = Skeleton(read_config(base), DTYPES[dtype])
    key = PackingKey(packing.format, packing.double_quant, packing.block_size)
    written = packed_folder(cache_root(), base, skeleton, packing)
    assert folder_by_key(cache_root(), base, key, dtype) == written
    assert PACKED_BASE in planned(base, packing, dtype).disk
    assert pack(base, packing, dtype) == written
    assert PACKED_BASE not in planned(base, packing, dtype).disk
    other = Packing("nf4") if packing != Packing("nf4") else Packing("int8")
    assert PACKED_BASE in planned(base, other, dtype).disk


def test_a_full_disk_does_not_stop_a_second_run(base: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    packing, dtype = Packing("nf4", True), "float32"
    needed = planned(base, packing, dtype).disk
    usage = namedtuple("usage", "total used free")
    free_bytes = sum(needed.values()) - needed[PACKED_BASE]
    monkeypatch.setattr(host_bytes.shutil, "disk_usage", lambda folder: usage(10**12, 0, free_bytes))
    assert [problem.split(":")[0] for problem in planned(base, packing, dtype).problems] == ["disk"]
    monkeypatch.undo()
    pack(base, packing, dtype)
    monkeypatch.setattr(host_bytes.shutil, "disk_usage", lambda folder: usage(10**12, 0, free_bytes))
    assert planned(base, packing, dtype).fits


@pytest.mark.parametrize("damage", ["shortened", "without a file", "without a manifest", "another base"])
def test_a_damaged_cache_is_none(base: Path, damage: str) -> None:
    packing, dtype = Packing("nf4", True), "float32"
    folder = pack(base, packing, dtype)
    if damage == "shortened":
        with (folder / LAYERS).open("r+b") as file:
            file.truncate(10)
    elif damage == "without a file":
        (folder / LAYERS).unlink()
    elif damage == "without a manifest":
        (folder / MANIFEST).unlink()
    else:
        shutil.rmtree(base)
        write_checkpoint(base, num_hidden_layers=2, seed=1)
    assert PACKED_BASE in planned(base, packing, dtype).disk
