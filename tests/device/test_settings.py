"""What torch is told before anything is computed: read back from torch, in a process of its own where it is
for the whole process."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest
from tiny_runs import child_environment

from qlora_train.device import settings

READ_BACK = """
import json, torch
from qlora_train.device import settings
said = []
settings._set_allocator = said.append
settings.apply_settings()
matmul = torch.backends.cuda.matmul
print(json.dumps([
    torch.backends.cuda.cudnn_sdp_enabled(),
    bool(matmul.allow_fp16_reduced_precision_reduction),
    bool(matmul.allow_bf16_reduced_precision_reduction),
    torch.backends.cuda.flash_sdp_enabled(),
    torch.backends.cuda.mem_efficient_sdp_enabled(),
    said,
]))
"""


def read_back(**environment: str) -> list[object]:
    done = subprocess.run(
        [sys.executable, "-c", READ_BACK],
        env=child_environment(**environment),
        capture_output=True,
        text=True,
        check=True,
    )
    return json.loads(done.stdout)


def test_cudnns_attention_and_16_bit_sums_are_off_and_memory_may_grow() -> None:
    expands = ["expandable_segments:True"] if sys.platform == "linux" else []
    assert read_back() == [False, False, False, True, True, expands]


@pytest.mark.parametrize("variable", settings.ALLOCATOR_VARIABLES)
def test_what_the_user_says_of_the_allocator_stays(variable: str) -> None:
    assert read_back(**{variable: "max_split_size_mb:128"})[-1] == []


def test_torch_takes_the_allocators_settings_also_when_it_is_imported() -> None:
    program = "import torch; from qlora_train.device import settings; settings.apply_settings()"
    subprocess.run([sys.executable, "-c", program], env=child_environment(), check=True)
