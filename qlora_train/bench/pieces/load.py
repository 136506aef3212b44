"""From a checkpoint in 16 bits to a base in 4 bits, ready to be trained on: time and peak, no training.

Ours: what a run does between reading its recipe and its first step with the base (`memory/load.py`), packing
into memory and keeping nothing, or from the packed cache of an earlier run. Peer: `from_pretrained` with a
BitsAndBytesConfig. The checkpoint's files are read through once before the clock starts, so that nobody pays
for a cold page cache; the peak counts mapped file pages where a loader maps files.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from qlora_train.bench.pieces.figures import compute_device, compute_dtype, now, warm_page_cache
from qlora_train.bench.process import answer, peaks


def measure(arguments: dict[str, Any]) -> dict[str, Any]:
    """arguments: inputs; by: "ours", "ours-cached" or "transformers"."""
    base = Path(arguments["inputs"]["base"])
    warm_page_cache(base)
    if arguments["by"] == "transformers":
        from qlora_train.bench.pieces.peer import load_packed

        started = now()
        model: Any = load_packed(str(base))
    else:
        from qlora_train.memory.load import load_base
        from qlora_train.memory.packed_cache import cache_root
        from qlora_train.model.quantize import Packing

        started = now()
        cache = cache_root() if arguments["by"] == "ours-cached" else None
        model = load_base(
            base, Packing("nf4", double_quant=True), compute_dtype(), compute_device(), cache=cache
        )
    seconds = now() - started
    assert model is not None
    return {"load_seconds": seconds, **peaks()}


if __name__ == "__main__":
    answer(measure)
