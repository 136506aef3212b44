"""soup-cli with layer streaming, measured by its own `soup bench train`, in whatever environment it lives.

It needs an older trl than the one compared with, so it is run as a command, not imported. Its report has the
seconds of the timed steps, their tokens and the allocator's peak; the other figures are not to be had.
"""

from __future__ import annotations

import json
import resource
import subprocess
import tempfile
from pathlib import Path
from typing import Any

from benchmarks.process import answer


def measure(arguments: dict[str, Any]) -> dict[str, Any]:
    """arguments: inputs, rank, optimizer, row_tokens, num_warm_up, num_timed. One row a step: layer streaming
    takes no more. Raises `RuntimeError` with the end of what the command printed where it fails."""
    with tempfile.TemporaryDirectory(prefix="qlora-bench-soup-") as name:
        folder = Path(name)
        (folder / "soup.yaml").write_text(json.dumps(soup_config(arguments)))  # JSON is YAML
        steps = arguments["num_warm_up"] + arguments["num_timed"]
        command = ["soup", "bench", "train", "--config", "soup.yaml", "--steps", str(steps)]
        command += ["--warmup", str(arguments["num_warm_up"]), "--output", "report.json"]
        done = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)
        if done.returncode:
            raise RuntimeError((done.stdout + done.stderr).strip()[-2000:])
        report = json.loads((folder / "report.json").read_text(encoding="utf-8"))
    return figures_of(report) | {
        "process_peak_bytes": resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss * 1024
    }


def soup_config(arguments: dict[str, Any]) -> dict[str, Any]:
    """The case's settings in the words of soup.yaml."""
    rank = arguments["rank"]
    return {
        "base": arguments["inputs"]["base"],
        "task": "sft",
        "data": {
            "train": arguments["inputs"]["rows"],
            "format": "plaintext",
            "max_length": arguments["row_tokens"],
            "val_split": 0.0,
        },
        "training": {
            "epochs": 1,
            "batch_size": 1,
            "gradient_accumulation_steps": 1,
            "optimizer": arguments["optimizer"],
            "quantization": "4bit",
            "stream_layers": True,
            "lora": {"r": rank, "alpha": 2 * rank, "dropout": 0.0, "target_modules": "all-linear"},
        },
    }


def figures_of(report: dict[str, Any]) -> dict[str, Any]:
    """Our names for what the report says."""
    timing = report["timing"]
    num_timed = report["steps_measured"] - timing["warmup_steps_discarded"]
    return {
        "tokens_per_second": report["throughput"]["total_tokens_per_second"],
        "step_seconds": timing["total_seconds"] / num_timed,
        "num_timed_steps": num_timed,
        "num_timed_tokens": report["tokens"]["total"],
        "device_peak_bytes": report["memory"]["max_memory_allocated_bytes"],
        "device_reserved_peak_bytes": report["memory"]["max_memory_reserved_bytes"],
    }


if __name__ == "__main__":
    answer(measure)
