"""Records: added to, read back as they were, and never half-understood."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path

import pytest
from benchmarks import record
from benchmarks.machine import describe_machine

from qlora_train.errors import UserError


def test_records_come_back_in_order(tmp_path: Path) -> None:
    folder = tmp_path / "new" / "folder"
    assert record.read(folder, "speed") == []
    records = [{"case": "a", "figures": {"load_seconds": 1.5}}, {"case": "b", "error": "two\nlines é"}]
    for one in records:
        record.append(folder, "speed", one)
    record.append(folder, "memory", {"case": "c"})
    assert record.read(folder, "speed") == records
    assert record.read(folder, "memory") == [{"case": "c"}]
    assert len((folder / "speed.jsonl").read_text().splitlines()) == 2


def test_what_is_no_record_is_refused(tmp_path: Path) -> None:
    record.append(tmp_path, "speed", {"case": "a"})
    with pytest.raises(ValueError, match="not JSON compliant"):
        record.append(tmp_path, "speed", {"figures": {"loss": float("nan")}})
    assert len(record.read(tmp_path, "speed")) == 1
    with (tmp_path / "speed.jsonl").open("a") as file:
        file.write('{"case": "cut')
    with pytest.raises(UserError, match=r"speed.jsonl:2: not a record"):
        record.read(tmp_path, "speed")


def test_the_machine_is_described_in_plain_values() -> None:
    import torch

    machine = describe_machine()
    assert json.loads(json.dumps(machine)) == machine
    assert machine["cpu"] and machine["num_cores"] >= 1 and machine["ram_bytes"] > 2**28
    # A CUDA build's module adds "+cu130", which its distribution's version need not have.
    assert machine["versions"]["torch"].split("+")[0] == torch.__version__.split("+")[0]
    assert machine["versions"]["peft"] and "unsloth" in machine["versions"]
    if torch.cuda.is_available():
        assert machine["gpu"]["memory_mib"] > 1000 and machine["gpu"]["compute_capability"]
    else:
        assert machine["gpu"] is None


def test_the_commit_is_that_of_the_checkout() -> None:
    root = Path(__file__).parents[2]
    done = subprocess.run(["git", "-C", str(root), "rev-parse", "HEAD"], capture_output=True, text=True)
    commit = describe_machine()["commit"]
    if done.returncode:
        assert commit is None
    else:
        assert commit.split()[0] == done.stdout.strip() and commit.split()[1:] in ([], ["dirty"])
