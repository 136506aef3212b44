"""Programs in processes of their own: one rank per device, exit codes, the report."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from simulated_gpu import __main__ as command

TESTS = Path(__file__).resolve().parent.parent
TIMEOUT_SECONDS = 600


def start(*arguments: str, **environment: str) -> subprocess.Popen[str]:
    search = os.pathsep.join([str(TESTS), str(TESTS.parent)])
    return subprocess.Popen(
        [sys.executable, "-W", "ignore", "-m", "simulated_gpu", *arguments],
        env={**os.environ, "PYTHONPATH": search, "OMP_NUM_THREADS": "1", **environment},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def test_collectives_of_two_ranks(tmp_path: Path) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    ranks = [
        start(
            *("--report", str(tmp_path / f"{rank}.json"), "simulated_gpu.rank_program"),
            RANK=str(rank),
            LOCAL_RANK=str(rank),
            WORLD_SIZE="2",
            LOCAL_WORLD_SIZE="2",
            MASTER_ADDR="127.0.0.1",
            MASTER_PORT=port,
        )
        for rank in range(2)
    ]
    for rank, process in enumerate(ranks):
        said, _ = process.communicate(timeout=TIMEOUT_SECONDS)
        assert process.returncode == 0 and f"rank {rank} is right" in said, said
        report = json.loads((tmp_path / f"{rank}.json").read_text(encoding="utf-8"))
        assert report["hazards"] == [] and report["num_operators"] > 0
        assert any("rank_program.py:" in place for _, place, _ in report["host_reads"])


RACES = """
import torch
slot = torch.empty(2, device="sim")
with torch.sim.stream(torch.sim.Stream()):
    slot.fill_(1)
torch.sim.synchronize()
"""


@pytest.mark.parametrize(
    ("program", "code"),
    (
        (RACES, command.HAZARDS_FOUND),
        ("import sys; sys.exit(5)", 5),
        ("import sys; sys.exit('no')", 1),
        ("import torch; assert torch.sim.get_device_capability() == (7, 5)", 0),
    ),
)
def test_exit_codes(
    program: str,
    code: int,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    (tmp_path / "program_on_device.py").write_text(program, encoding="utf-8")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(sys, "argv", list(sys.argv))
    assert command.main(["--capability", "7.5", "--memory-mib", "64", "program_on_device"]) == code
    said = capsys.readouterr().err
    assert ("hazard: aten::fill_" in said) == (code == command.HAZARDS_FOUND)
