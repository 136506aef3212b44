"""What `qlora-train plan` is asked: found or stated machines, and what is assumed of them."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
from huggingface_hub.errors import LocalEntryNotFoundError
from tiny_models import tiny_config

from qlora_train.device.cards import CARDS, known_card
from qlora_train.device.description import planned_gpu
from qlora_train.errors import UserError
from qlora_train.plan import request as request_module
from qlora_train.plan.base_config import fetch_config, find_config
from qlora_train.plan.model_shape import find_shape
from qlora_train.plan.request import FoundCard, find_card, request_of
from qlora_train.plan.time_model import stated_rates
from qlora_train.recipe import Recipe

GIB = 2**30


def recipe(**memory: Any) -> Recipe:
    values = {"model": {"base": "meta-llama/Llama-3.2-1B"}, "data": {"train": "x"}, "memory": memory}
    return Recipe.from_dict(values)


def test_another_machine_is_what_is_said_of_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(request_module, "find_card", lambda: FoundCard("NVIDIA L4", 20 * GIB, (8, 9)))
    stated = request_of(recipe(), "rtx 4090", 64 * GIB, 200 * GIB)
    assert stated.target == planned_gpu("RTX 4090", None) and stated.free_bytes == 24 * GIB
    assert stated.host.ram_bytes == int(0.9 * 64 * GIB) and stated.host.disk_bytes == 200 * GIB
    assert not stated.is_here and not stated.host.has_quantized_base
    for words in (
        "RTX 4090 with 24 GiB",
        "64.00 GiB of RAM",
        "57.60 GiB of it free",
        "200.00 GiB of free disk",
    ):
        assert words in stated.assumed
    here = request_of(recipe())
    assert here.is_here and here.device_text == "NVIDIA L4" and here.assumed == ""
    without_ram = request_of(recipe(), "RTX 4090")
    assert without_ram.host.ram_bytes > 0 and "RAM that is free here" in without_ram.assumed


@pytest.mark.parametrize(
    ("card", "expected"),
    [
        ("RTX 5099", r"--card RTX 5099: is not .*did you mean RTX 5090\?.*\"RTX 5090\" memory\.vram=16GiB"),
        ("4O90", r"did you mean RTX 4090\?"),
        ("RTX 4070 SUPER OC", r"did you mean RTX 4070 SUPER, RTX 4070\?"),
        ("GTX 1080", r"those are RTX 5090, .*, H200.*memory\.vram=16GiB"),
        ("RTX 2060 and RTX 4090", "those are RTX 5090"),
        ("RTX 4090 8GB 24GB", r"did you mean RTX 4090\?"),
        ("L40S", "those are RTX 5090"),
        ("RTX 4080 8GB", r'--card RTX 4080 8GB: has 16 GB; .*--card "RTX 4080" memory\.vram=SIZE'),
        ("RTX 3080 16GB", "has 10 or 12 GB"),
        ("", "--card: is empty"),
        (" ", "--card: is empty"),
    ],
)
def test_a_card_that_is_not_known_is_refused_with_what_to_say(card: str, expected: str) -> None:
    with pytest.raises(UserError, match=expected):
        request_of(recipe(), card)


@pytest.mark.parametrize(
    ("card", "gib"),
    [
        ("rtx4090", 24),
        ("4070 super", 12),
        ("RTX 4070 Ti SUPER", 16),
        ("RTX 4090 Laptop", 16),
        ("rtx-5090 laptop", 24),
        ("RTX 4090 Mobile", 16),
        ("RTX 3060", 12),
        ("RTX 3060 8 GB", 8),
        ("RTX 4060 Ti", 8),
        ("RTX 4060 Ti 16GB", 16),
        ("RTX 3080 Ti", 12),
        ("RTX 3080 12GiB", 12),
        ("A100", 40),
        ("A100-SXM4-80GB", 80),
        ("H100 80GB", 80),
    ],
)
def test_the_memory_of_a_named_card(card: str, gib: int) -> None:
    assert request_of(recipe(), card, GIB, GIB).free_bytes == gib * GIB


def test_every_card_is_found_by_its_own_name() -> None:
    assert [known_card(f"NVIDIA {name}") for name in CARDS] == list(CARDS)


def test_without_a_card_a_size_stands_for_one_else_the_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(request_module, "find_card", lambda: None)
    sized = request_of(recipe(vram="6GiB"))
    assert sized.target.is_accelerator and not sized.is_here and sized.free_bytes == 6 * GIB
    cpu = request_of(recipe(), ram_bytes=8 * GIB)
    assert not cpu.target.is_accelerator and cpu.free_bytes == 8 * GIB
    assert cpu.recipe.model.compute_dtype in ("bfloat16", "float32")


@pytest.mark.parametrize(
    ("name", "known"),
    [
        ("NVIDIA GeForce RTX 4090", "RTX 4090"),
        ("NVIDIA GeForce RTX 4090 Laptop GPU", "RTX 4090 Laptop"),
        ("NVIDIA GeForce RTX 3060", "RTX 3060 12GB"),
        ("NVIDIA GeForce RTX 4060 Ti", "RTX 4060 Ti 8GB"),
        ("NVIDIA RTX A6000", "RTX A6000"),
        ("Tesla T4", "T4"),
        ("NVIDIA L4", "L4"),
        ("A100-SXM4-40GB", "A100 40GB"),
        ("NVIDIA A100-SXM4-80GB", "A100 80GB"),
        ("NVIDIA A100 80GB PCIe", "A100 PCIe 80GB"),
        ("NVIDIA A100-PCIE-40GB", "A100 PCIe 40GB"),
        ("NVIDIA A10", "A10"),
        ("NVIDIA L40S", None),
        ("NVIDIA H100 80GB HBM3", "H100"),
        ("NVIDIA H100 PCIe", "H100 PCIe"),
        ("NVIDIA GeForce RTX 4090 and more", None),
        (None, None),
    ],
)
def test_one_table_says_what_a_card_is(name: str | None, known: str | None) -> None:
    assert known_card(name) == known
    target = planned_gpu(name, (9, 9))
    rates = stated_rates(replace(target, name=name or ""))
    if known is not None:
        assert (rates.flops, rates.memory, rates.copy) == (
            CARDS[known].flops,
            CARDS[known].memory,
            CARDS[known].copy,
        )
        assert target.num_multiprocessors == CARDS[known].num_multiprocessors


CARD_0 = FoundCard("NVIDIA GeForce RTX 4090", 23028 * 2**20, (8, 9))
ROWS = "GPU-b, NVIDIA T4, 15000, 7.5\\nGPU-a, NVIDIA GeForce RTX 4090, 23028, 8.9"


@pytest.mark.parametrize(
    ("uuid", "answer", "code", "expected"),
    [
        ("a", ROWS, 0, CARD_0),  # the order of CUDA, not of the tool
        ("b", ROWS, 0, FoundCard("NVIDIA T4", 15000 * 2**20, (7, 5))),
        (None, ROWS, 0, None),  # none is visible to CUDA
        ("a", "NVIDIA-SMI has failed because it could not communicate with the driver", 9, None),
        ("a", "No devices were found", 0, None),
        ("a", "", 0, None),
    ],
)
def test_the_card_is_the_one_that_cuda_takes(
    uuid: str | None,
    answer: str,
    code: int,
    expected: FoundCard | None,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    tool = tmp_path / "nvidia-smi"
    tool.write_text(f"#!/bin/sh\nprintf '{answer}'\nexit {code}\n")
    tool.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=":")
    monkeypatch.setattr(request_module, "first_uuid", lambda: uuid)
    assert find_card() == expected


def test_without_the_tool_there_is_no_card(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setattr(request_module, "first_uuid", lambda: "a")
    assert find_card() is None


def test_a_config_is_fetched_from_the_hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[Any] = []

    def download(base: str, file: str, revision: str | None) -> str:
        asked.append((base, file, revision))
        tiny_config("llama").save_pretrained(tmp_path)
        return str(tmp_path / file)

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", download)
    assert find_config("someone/new-model") == {}
    assert find_shape("someone/new-model", "v1").hidden == tiny_config("llama").hidden_size
    assert asked == [("someone/new-model", "config.json", "v1")]


def test_offline_it_is_said_what_to_do(monkeypatch: pytest.MonkeyPatch) -> None:
    def offline(*_: Any, **__: Any) -> str:
        raise LocalEntryNotFoundError("Cannot find the requested files\nmore")

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", offline)
    with pytest.raises(UserError, match=r"neither a folder.*requested files\).*Offline.*model\.base=FOLDER"):
        fetch_config("someone/new-model", None)
    with pytest.raises(UserError, match="there is no folder /no/such"):
        fetch_config("/no/such", None)
