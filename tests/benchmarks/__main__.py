"""`PYTHONPATH=tests python -m benchmarks`: measure speed and memory beside other trainers; see command.py."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console

from benchmarks.command import list_cases, run_bench
from qlora_train.cli.types import count
from qlora_train.errors import QloraTrainError


def main(argv: Sequence[str] | None = None) -> int:
    """Returns the exit code."""
    parser = argparse.ArgumentParser(prog="benchmarks")
    parser.add_argument("names", metavar="NAME", nargs="*", help="cases (default: all)")
    parser.add_argument("--list", action="store_true", help="show the cases")
    parser.add_argument("--runs", type=count, default=3, metavar="N", help="of each contender (default: 3)")
    parser.add_argument(
        "--record",
        type=Path,
        default=Path("bench-results"),
        metavar="DIR",
        help="add figures, machine and versions to the files here (default: ./bench-results)",
    )
    args = parser.parse_args(argv)
    console = Console()
    try:
        if args.list:
            list_cases(console)
        else:
            run_bench(args.names, num_runs=args.runs, records=args.record, console=console)
    except QloraTrainError as error:
        print(f"benchmarks: {error}", file=sys.stderr)
        return error.exit_code
    return 0


if __name__ == "__main__":
    sys.exit(main())
