"""Ranks of one machine: they say the same, plan the same, quantize once and hold what waits in RAM once."""

from __future__ import annotations

import os
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import rank_tasks
import torch
from rank_tasks import in_ranks
from tiny_runs import write_base

from qlora_train.device.compute import THE_CPU
from qlora_train.weights.cache_key import cache_root
from qlora_train.weights.load import load_base
from qlora_train.weights.ranks import ALONE, find_ranks
from qlora_train.weights.shared_pages import make_pages, open_pages

MIB = 2**20
LAYER_BYTES = 4 * (4 * 512 * 512 + 3 * 512 * 1024)
MATRIX_BYTES = 4 * 259 * 512
IN_RAM_BYTES = 4 * LAYER_BYTES + 2 * MATRIX_BYTES

pytestmark = [
    pytest.mark.skipif(not torch.distributed.is_gloo_available(), reason="this torch has no gloo"),
    pytest.mark.skipif(not hasattr(os, "memfd_create"), reason="needs Linux"),
]


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    sizes = {"hidden_size": 512, "intermediate_size": 1024, "num_hidden_layers": 4}
    return write_base(tmp_path_factory.mktemp("wide") / "base", **sizes, num_key_value_heads=4)


def test_one_process_is_alone() -> None:
    ranks = find_ranks(torch.device("cpu"))
    assert ranks is ALONE and ranks.leads and not ranks.shares_memory
    with ranks.leaders_first():
        ranks.wait()
    assert ranks.gather({"a": 1}) == [{"a": 1}] and ranks.of_leader(3) == 3


def test_ranks_say_the_same_and_leaders_go_first(tmp_path: Path) -> None:
    told = in_ranks(rank_tasks.agree, tmp_path / "meeting", tmp_path, number=3)
    assert [one["ranks"] for one in told] == [(i, 3, (0, 1, 2), True, i == 0) for i in range(3)]
    values = [{"rank": i, "text": "x" * 10 * i} for i in range(3)]
    assert all(one["gathered"] == values and one["leader"] == "of rank 0" for one in told)
    assert (tmp_path / "order").read_text()[0] == "0"


def test_who_waits_for_a_rank_that_has_ended_hears_of_it(tmp_path: Path) -> None:
    assert "have lost each other" in in_ranks(rank_tasks.end_early, tmp_path / "meeting")[0]


def test_pages_are_one_and_the_same_and_no_file_is_left() -> None:
    descriptor, pages = make_pages(100_000)
    again = open_pages(os.getpid(), descriptor, 100_000)
    pages[99_999] = 7
    assert again[99_999] == 7 and again[0] == 0
    os.close(descriptor)
    with pytest.raises(OSError):
        open_pages(os.getpid(), descriptor, 100_000)


def loaded(base: Path, meeting: Path, cache: Path | None, *, shares: bool) -> list[dict[str, Any]]:
    return in_ranks(partial(rank_tasks.load_in_ram, shares=shares), meeting, base, cache)


def test_two_ranks_hold_what_waits_in_ram_once(tmp_path: Path, base: Path) -> None:
    """Pages that both map count half for each, so the sum is what the machine gives."""
    cache = tmp_path / "cache"
    load_base(base, rank_tasks.UNQUANTIZED, torch.float32, THE_CPU, cache=cache).close()
    together = loaded(base, tmp_path / "together", cache, shares=True)
    apart = loaded(base, tmp_path / "apart", cache, shares=False)
    shared_bytes = sum(rank["grown"]["Pss_Shmem"] for rank in together)
    assert IN_RAM_BYTES <= shared_bytes <= IN_RAM_BYTES + MIB
    halves = [rank["grown"]["Pss_Shmem"] for rank in together]
    assert abs(halves[0] - halves[1]) <= 2 * MATRIX_BYTES + MIB  # embedding and head: not visited yet
    assert sum(rank["grown"]["Pss_Shmem"] for rank in apart) <= MIB
    own, own_apart = (sum(rank["grown"]["Pss_Anon"] for rank in ranks) for ranks in (together, apart))
    assert own_apart - own >= 1.95 * IN_RAM_BYTES  # each has them for itself
    assert together[0]["sums"] == together[1]["sums"] == apart[0]["sums"] == apart[1]["sums"]
    assert together[0]["sums"][0] > 0


@pytest.mark.parametrize("keeps", [True, False])
def test_one_rank_quantizes_and_the_other_reads(tmp_path: Path, base: Path, *, keeps: bool) -> None:
    before = set(cache_root().glob("*"))
    first, second = loaded(base, tmp_path / "meeting", tmp_path / "cache" if keeps else None, shares=True)
    assert len(first["said"]) == 1 and first["said"][0].startswith("quantizing the base, once")
    assert second["said"] == []
    assert first["sums"] == second["sums"] and first["fingerprint"] == second["fingerprint"]
    assert set(cache_root().glob("*")) == before


def test_the_smallest_budget_binds_and_all_plan_the_same(tmp_path: Path, base: Path) -> None:
    ram_bytes, rates = [8 * 2**30, 6 * 2**30], [5e9, 9e9]
    first, second = in_ranks(rank_tasks.plan, tmp_path / "meeting", base, ram_bytes, rates)
    assert first == second
    assert first["ram_budget_bytes"] == int(0.9 * 6 * 2**30)
    assert first["vram_budget_bytes"] == int(0.9 * 3 * 2**30)  # two ranks compute in the same RAM
    assert first["rates"]["copy_bytes_per_second"] == 5e9 and "2 ranks" in first["rates"]["source"]
    assert (first["ranks_per_machine"], first["copies_in_ram"]) == (2, 1)


def test_different_cards_do_what_both_can(tmp_path: Path) -> None:
    first, second = in_ranks(rank_tasks.describe, tmp_path / "a", ["RTX 3090", "T4"])
    assert first | {"index": None, "name": ""} == second | {"index": None, "name": ""}
    assert first["capability"] == (7, 5) and not first["has_bfloat16"]
    assert first["num_multiprocessors"] == 82 and (first["index"], second["index"]) == (0, 1)
    refused = in_ranks(rank_tasks.describe, tmp_path / "b", ["RTX 3090", "cpu"])
    assert all("different kinds (cpu, cuda)" in one["refused"] for one in refused)
