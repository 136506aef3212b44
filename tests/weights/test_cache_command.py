"""`qlora-train cache list | clear`: what is there, and what may go."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from tiny_models import NF4, write_checkpoint

from qlora_train.cli import main
from qlora_train.device.compute import THE_CPU
from qlora_train.files.atomic_folder import atomic_folder
from qlora_train.model.base import MetaModel, read_config
from qlora_train.quant.formats import Quantization
from qlora_train.weights.cache_command import clear_cache, list_cache
from qlora_train.weights.execution_plan import ActivationPolicy, ExecutionPlan, Placement
from qlora_train.weights.load import load_base
from qlora_train.weights.quantized_cache import open_quantized_base

STREAMED = ExecutionPlan(
    weights=(Placement.DISK,) * 2,
    activations=(ActivationPolicy.KEEP,) * 2,
    embedding=Placement.DEVICE,
    head=Placement.DEVICE,
    num_groups=1,
    inputs=Placement.DEVICE,
    hold_dequantized=False,
    mlp_tile_tokens=None,
    loss_tokens=512,
    head_tile_rows=4096,
    num_slots=2,
)


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_checkpoint(tmp_path_factory.mktemp("base"), num_hidden_layers=2)


@pytest.fixture
def root(tmp_path: Path, base: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Two quantized bases, a leftover, and what is none of these."""
    root = tmp_path / "cache"
    monkeypatch.setenv("QLORA_TRAIN_CACHE", str(root))
    for quantization in (NF4, Quantization("int8")):
        meta_model = MetaModel(read_config(base), torch.float32)
        open_quantized_base(root, base, meta_model, quantization, torch.device("cpu"), lambda line: None)
    leftover = root / "gone-nf4-1.partial-ab"
    leftover.mkdir()
    (leftover / "layers.bin").write_bytes(b"x" * 10)
    (root / "rates.json").write_text("{}")
    (root / "bench").mkdir()
    return root


def test_the_list_says_what_it_is_and_from_which_base(
    root: Path, base: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    entries = list_cache(root)
    assert [entry.contents for entry in entries] == [str(base), str(base), "leftover"]
    assert entries[0].num_bytes >= entries[1].num_bytes > entries[2].num_bytes == 10
    assert main(["cache", "list"]) == 0
    assert main(["cache"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[:4] == lines[4:] and len(lines) == 8
    assert all(entry.folder.name in line for entry, line in zip(entries, lines[:3], strict=True))
    assert str(base) in lines[0] and "leftover" in lines[2] and str(root) in lines[3]


def test_a_cache_that_is_not_there_is_empty(tmp_path: Path) -> None:
    assert list_cache(tmp_path / "absent") == [] and clear_cache(tmp_path / "absent") == ([], [])


def test_clear_takes_all_but_what_is_in_use(
    root: Path, base: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    decoder = load_base(base, NF4, torch.float32, THE_CPU, plan=STREAMED, cache=root)
    in_use = next(entry for entry in list_cache(root) if entry.is_in_use)
    assert "nf4" in in_use.folder.name
    with atomic_folder(root / "new-nf4-1") as live:
        assert main(["cache", "clear"]) == 0
        assert live.is_dir()
    assert "in use, kept" in capsys.readouterr().out
    assert {path.name for path in root.iterdir()} == {"rates.json", "bench", "new-nf4-1", in_use.folder.name}
    decoder.close()
    assert main(["cache", "clear"]) == 0
    assert not in_use.folder.exists()


def test_clear_by_name(root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    names = [entry.folder.name for entry in list_cache(root)]
    assert main(["cache", "clear", names[1], "no-such"]) == 2
    assert "no-such" in capsys.readouterr().err and len(list_cache(root)) == 3
    assert main(["cache", "clear", names[1]]) == 0
    assert [entry.folder.name for entry in list_cache(root)] == [names[0], names[2]]
