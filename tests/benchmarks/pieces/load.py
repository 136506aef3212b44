"""From a checkpoint in 16 bits to a base in 4 bits, ready to be trained on: time and peak, no training.

Ours: what a run does between reading its recipe and its first step with the base (`weights/load.py`),
quantizing into memory and keeping nothing, or from the quantized cache of an earlier run. Peer:
`from_pretrained` with a BitsAndBytesConfig. The checkpoint's files are read through once before the clock
starts, so that nobody pays for a cold page cache; the peak counts mapped file pages where a loader maps
files.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from benchmarks.pieces.figures import compute_device, compute_dtype, now, warm_page_cache
from benchmarks.process import answer, peaks


def measure(arguments: dict[str, Any]) -> dict[str, Any]:
    """arguments: inputs; by: "ours", "ours-cached" or "transformers"."""
    base = Path(arguments["inputs"]["base"])
    warm_page_cache(base)
    if arguments["by"] == "transformers":
        from benchmarks.pieces.peer import load_quantized

        started = now()
        model: Any = load_quantized(str(base))
    else:
        from qlora_train.quant.formats import Quantization
        from qlora_train.weights.cache_key import cache_root
        from qlora_train.weights.load import load_base

        started = now()
        cache = cache_root() if arguments["by"] == "ours-cached" else None
        model = load_base(
            base, Quantization("nf4", double_quant=True), compute_dtype(), compute_device(), cache=cache
        )
    seconds = now() - started
    assert model is not None
    return {"load_seconds": seconds, **peaks()}


if __name__ == "__main__":
    answer(measure)
