"""One peer on the case that we are measured on. Its base in 16 bits and its rows are made first, in a process
of their own: a peer may have to be imported before what they need is.
"""

from __future__ import annotations

import shutil
import time
from pathlib import Path
from typing import Any

from benchmarks.process import answer, run_piece

INPUTS = "benchmarks.pieces.inputs"
MOST_SECONDS = 600.0
"""Of either; the stage as a whole has its own limit."""


def measure(arguments: dict[str, Any]) -> dict[str, Any]:
    """arguments: work; name; module, settings: of the peer's piece; inputs: of inputs.py;
    remove_inputs: at the end."""
    folder = Path(arguments["work"]) / "peers"
    started = time.perf_counter()
    made = run_piece(INPUTS, {"folder": str(folder), **arguments["inputs"]}, timeout_seconds=MOST_SECONDS)
    if made.figures is None:
        raise RuntimeError(f"its inputs could not be made: {made.error}")
    input_seconds = time.perf_counter() - started
    settings = {**arguments["settings"], "inputs": made.figures["paths"]}
    try:
        outcome = run_piece(arguments["module"], settings, timeout_seconds=MOST_SECONDS)
    finally:
        if arguments["remove_inputs"]:
            shutil.rmtree(folder, ignore_errors=True)
    if outcome.figures is None:
        raise RuntimeError(f"{arguments['name']} failed: {outcome.error}")
    return {
        "runs": {arguments["name"]: outcome.figures},
        "remarks": [f"inputs made in {input_seconds:.0f} s"],
        "problems": [],
    }


if __name__ == "__main__":
    answer(measure)
