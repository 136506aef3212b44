"""From an adapter and its base to merged 16-bit weights on disk: time and peak.

Ours: `qlora_train.export`, as `qlora-train export RUN --to merged --receipt none` calls it. Peer: the base in
16 bits, `merge_and_unload`, `save_pretrained`. Both write float16 safetensors; imports are not in the time.

Our export returns when its files are on the disk (it syncs them before they get their name), the peer's when
they are in the page cache. So two figures: until it returns, and until everything is on the disk. Nothing
unwritten is left over from others when the clock starts.
"""

from __future__ import annotations

import os
import shutil
import tempfile
from pathlib import Path
from typing import Any

import torch

from benchmarks.pieces.figures import now, warm_page_cache
from benchmarks.process import answer, peaks


def measure(arguments: dict[str, Any]) -> dict[str, Any]:
    """arguments: inputs with a `run` (an adapter trained on `base`); by: "peft", or "dequantized" or
    "original", what of the base ours merges into."""
    run, base = Path(arguments["inputs"]["run"]), Path(arguments["inputs"]["base"])
    warm_page_cache(base)
    with tempfile.TemporaryDirectory(prefix="qlora-bench-merge-", dir=run.parent) as folder:
        out = Path(folder) / "merged"
        merge = _by_peft if arguments["by"] == "peft" else _by_us
        merge_seconds = merge(run, base, out, arguments["by"])
        started = now()
        os.sync()
        sync_seconds = now() - started
        num_bytes = sum(path.stat().st_size for path in out.glob("*.safetensors"))
        shutil.rmtree(out)
    return {
        "merge_seconds": merge_seconds,
        "merge_to_disk_seconds": merge_seconds + sync_seconds,
        "merged_bytes": num_bytes,
        **peaks(),
    }


def _by_us(run: Path, base: Path, out: Path, merge_into: str) -> float:
    import qlora_train.export.export_run  # noqa: F401  # what `export` itself imports late
    from qlora_train.export import export

    os.sync()
    started = now()
    export(run, base=merge_into, dtype="float16", out=out, receipt=None)
    return now() - started


def _by_peft(run: Path, base: Path, out: Path, by: str) -> float:
    from peft import PeftModel
    from transformers import AutoModelForCausalLM, AutoTokenizer

    os.sync()
    started = now()
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float16)
    merged = PeftModel.from_pretrained(model, run / "adapter").merge_and_unload()
    merged.save_pretrained(out)
    AutoTokenizer.from_pretrained(base).save_pretrained(out)
    return now() - started


if __name__ == "__main__":
    answer(measure)
