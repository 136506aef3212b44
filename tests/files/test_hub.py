"""Where a base is, and in which precision to compute."""

from __future__ import annotations

from pathlib import Path

import huggingface_hub
import pytest
import torch

from qlora_train.device.compute_dtype import dtype_name, resolve_dtype
from qlora_train.device.description import CPU, planned_gpu
from qlora_train.errors import BaseModelError, UserError
from qlora_train.files.hub import resolve_base

NAMED = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}


@pytest.mark.parametrize("name", NAMED)
def test_a_named_dtype_is_taken_at_its_word(name: str) -> None:
    assert resolve_dtype(name, CPU) == NAMED[name]
    assert dtype_name(NAMED[name]) == name


@pytest.mark.parametrize(("has_units", "expected"), [(True, torch.bfloat16), (False, torch.float32)])
def test_auto_on_a_cpu(monkeypatch: pytest.MonkeyPatch, has_units: bool, expected: torch.dtype) -> None:
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: has_units)
    assert resolve_dtype("auto", CPU) == expected


@pytest.mark.parametrize(("card", "expected"), [("RTX 3060", torch.bfloat16), ("T4", torch.float16)])
def test_auto_on_a_gpu(card: str, expected: torch.dtype) -> None:
    gpu = planned_gpu(card, None)
    assert resolve_dtype("auto", gpu) == expected
    assert resolve_dtype("float16", gpu) == torch.float16
    if expected == torch.bfloat16:
        assert resolve_dtype("bfloat16", gpu) == torch.bfloat16
    else:
        with pytest.raises(UserError, match=r"model\.compute_dtype: this GPU has no bfloat16.*float16"):
            resolve_dtype("bfloat16", gpu)


def test_a_local_folder(tmp_path: Path) -> None:
    assert resolve_base(str(tmp_path), None) == (tmp_path, None)
    with pytest.raises(BaseModelError, match=r"model\.revision is main.*remove the revision"):
        resolve_base(str(tmp_path), "main")


@pytest.mark.parametrize("base", ["/no/such/folder", "./missing", "../missing", "models/a/b"])
def test_a_missing_folder_is_not_taken_for_a_hub_id(base: str) -> None:
    with pytest.raises(BaseModelError, match="there is no folder"):
        resolve_base(base, None)


def test_a_hub_id_is_pinned_and_pickles_are_never_fetched(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    snapshot = tmp_path / "snapshots" / "0123abcd"
    asked: dict[str, object] = {}

    def download(repo_id: str, **options: object) -> str:
        asked.update(options, repo_id=repo_id)
        return str(snapshot)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    assert resolve_base("someone/some-model", "v1") == (snapshot, "0123abcd")
    assert (asked["repo_id"], asked["revision"]) == ("someone/some-model", "v1")
    patterns = asked["allow_patterns"]
    assert isinstance(patterns, list) and "*.safetensors" in patterns
    assert not any(pattern.endswith((".bin", ".pt", ".pth", "*")) for pattern in patterns)


def test_a_hub_id_that_cannot_be_fetched(monkeypatch: pytest.MonkeyPatch) -> None:
    def offline(*_: object, **__: object) -> str:
        raise OSError("no route to host\nand many more lines")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", offline)
    with pytest.raises(BaseModelError) as caught:
        resolve_base("someone/some-model", None)
    message = str(caught.value)
    assert "there is no folder someone/some-model" in message and "(no route to host)" in message
    assert "many more" not in message
