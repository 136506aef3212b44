"""The commands: `qlora-train init | train | plan | doctor | preview | generate | chat | eval | export |
report | recipes | cache`.

A command parses its arguments, imports what it needs inside its own function (so `--help` and `recipes` do
not import torch) and calls one function of a lower layer. User errors and failures of a run arrive here as a
`QloraTrainError` or an `OSError` and end as one message on stderr and an exit code:

    0 success    1 a failure (out of memory, disk full, non-finite)    2 a user's mistake    128 + n signal n

Unforeseen errors, which are bugs, end with a traceback.
"""

from __future__ import annotations

import argparse
import io
import logging
import os
import signal
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from qlora_train import __version__
from qlora_train.boundary import os_error, reason_of
from qlora_train.cli.generate import CHECKPOINT_HELP, add_chat, add_eval, add_generate
from qlora_train.cli.recipes import add_init, add_recipes
from qlora_train.cli.types import auto_count_or_none, count, size
from qlora_train.device.system import require_unix
from qlora_train.errors import Interrupted, QloraTrainError, RecipeError
from qlora_train.export import BASES, LOADERS, QUANTS, SERVER
from qlora_train.interrupts import RaisesInterrupted
from qlora_train.recipe import load_recipe
from qlora_train.terminal_text import message, tell

NEED_UNIX = {"train", "generate", "chat", "eval", "export", "cache"}


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; returns the exit code. Wrong usage exits with 2 through argparse."""
    for stream in (sys.stdout, sys.stderr):  # a terminal shows "?" for a character it lacks
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")
    parser = _parser()
    args, leftovers = parser.parse_known_args(argv)
    if "overrides" in args:  # argparse ends a list of positionals at the first option
        args.overrides += [text for text in leftovers if _is_override(text)]
        leftovers = [text for text in leftovers if not _is_override(text)]
    if leftovers:
        args.parser.error(f"unrecognized arguments: {' '.join(leftovers)}")
    _quiet_libraries()
    try:
        if args.command in NEED_UNIX:
            require_unix(args.command)  # before Unix-only modules are imported
        with RaisesInterrupted():
            args.run(args)
            sys.stdout.flush()
    except (QloraTrainError, Interrupted) as error:
        return _fail(error)
    except KeyboardInterrupt:
        return _fail(Interrupted(signal.SIGINT))
    except BrokenPipeError:  # the reader of our output, such as `head`, has closed it
        _discard_output()
        return 0
    except MemoryError:
        return _fail(QloraTrainError("out of memory"))
    except RuntimeError as error:
        from qlora_train.walk.oom_fallback import is_out_of_memory

        if not is_out_of_memory(error):
            raise
        first_line = (str(error).strip() or "an allocation failed").splitlines()[0]
        return _fail(QloraTrainError(f"out of memory: {first_line}"))
    except OSError as error:
        return _fail(os_error(error))
    return 0


def _discard_output() -> None:
    """Send the rest of stdout to /dev/null: it is closed or its disk is full, and flushing fails at exit."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _quiet_libraries() -> None:
    """Switch off progress bars and notes of libraries, but not their errors."""
    os.environ.setdefault("HF_DATASETS_DISABLE_PROGRESS_BARS", "1")
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="qlora-train", description="QLoRA fine-tuning on one GPU.")
    parser.add_argument("--version", action="version", version=f"qlora-train {__version__}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")

    def command(name: str, help_text: str, **defaults: Any) -> argparse.ArgumentParser:
        sub = commands.add_parser(name, help=help_text, description=help_text)
        sub.set_defaults(parser=sub, **defaults)
        return sub

    add_init(command)

    train = command("train", "train LoRA parameters as a recipe says", run=_train)
    _add_recipe(train)
    train.add_argument("--resume", action="store_true", help="continue from the newest checkpoint")
    train.add_argument("--no-cache", action="store_true", help="keep no quantized base and no tokens")

    plan = command("plan", "show what fits where, before anything is loaded", run=_plan)
    _add_recipe(plan)
    plan.add_argument("--vram", metavar="SIZE", help="a card's memory, such as 8GiB (memory.vram)")
    plan.add_argument("--card", metavar="NAME", help='plan for another card, such as "RTX 4090"')
    plan.add_argument("--ram", type=size, metavar="SIZE", help="of another machine, such as 64GiB")
    plan.add_argument("--disk", type=size, metavar="SIZE", help="free on another machine's disk")
    plan.add_argument("--details", action="store_true", help="a table of bytes by phase, place and cause")
    plan.add_argument("--json", action="store_true", help="for programs: what a run writes as plan.json")

    command("doctor", "check this machine for training, and say what to change", run=_doctor)

    preview = command("preview", "print the tokens the model will see, supervised ones marked", run=_preview)
    _add_recipe(preview)
    preview.add_argument("-n", "--num-rows", type=count, default=3, metavar="N", help="rows (default: 3)")
    preview.add_argument("--no-cache", action="store_true", help="do not keep the tokens for training")

    add_generate(command)
    add_chat(command)
    add_eval(command)

    export = command("export", "write a run as a model that other tools load", run=_export)
    export.add_argument("run_dir", metavar="RUN", type=Path)
    export.add_argument("--to", choices=("merged", "gguf", "adapter"), default="merged")
    export.add_argument(
        "--quant",
        metavar="|".join(QUANTS),
        help="with --to gguf, of the matrices in the file (default: f16)",
    )
    export.add_argument(
        "--base",
        choices=BASES,
        help="the weights to merge onto (default: original, where they are there)",
    )
    export.add_argument(
        "--dtype",
        choices=("auto", "float16", "bfloat16", "float32"),
        default="auto",
        help="with --to merged; auto (default): float16 where the model's values stay well inside its range",
    )
    export.add_argument("--checkpoint", metavar="best|last|step-N", help=CHECKPOINT_HELP)
    export.add_argument(
        "--receipt",
        type=auto_count_or_none,
        default="auto",
        metavar="N|none|auto",
        help="held-out supervised tokens that the written model is compared on (default: auto, 2000)",
    )
    export.add_argument(
        "--for",
        dest="loaders",
        action="append",
        default=[],
        choices=(*LOADERS, SERVER),
        help="load what was written with this, too, for the receipt; may be given several times; with --to "
        "adapter: vllm, whose rules for adapters are checked",
    )
    export.add_argument(
        "--push-to-hub",
        metavar="USER/NAME",
        help="upload the finished folder to the hub (hf auth login) as a new private model, or into an empty "
        "one, which stays as public as it is",
    )
    export.add_argument("--out", type=Path, metavar="DIR", help="default: inside the run folder")

    report = command("report", "write a run's page, report.html; of several runs a comparison", run=_report)
    report.add_argument("runs", metavar="RUN", type=Path, nargs="+")
    report.add_argument("--out", type=Path, metavar="FILE", help="the comparison (default: comparison.html)")
    report.add_argument(
        "--base", action="store_true", help="read the base, too: how far its directions are amplified"
    )

    add_recipes(command)

    cache = command(
        "cache", "list the quantized bases and tokens kept on disk, or make room", run=_list_cache
    )
    cache_actions = cache.add_subparsers(metavar="list | clear")
    cache_list = cache_actions.add_parser("list", help="name, size and origin of each")
    cache_list.set_defaults(run=_list_cache)
    clear = cache_actions.add_parser("clear", help="remove what no run is using")
    clear.add_argument("names", metavar="NAME", nargs="*", help="as `cache list` shows them (default: all)")
    clear.set_defaults(run=_clear_cache)
    return parser


def _add_recipe(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("recipe", metavar="RECIPE", help="a YAML file or the name of a bundled recipe")
    parser.add_argument(
        "overrides", metavar="KEY=VALUE", nargs="*", default=[], help="for example training.epochs=2"
    )


def _is_override(text: str) -> bool:
    return "=" in text and not text.startswith("-")


def _train(args: argparse.Namespace) -> None:
    recipe = load_recipe(args.recipe, args.overrides)
    from qlora_train.train import train

    run_dir = train(recipe, resume=args.resume, use_cache=not args.no_cache).run_dir
    tell(f"Run folder: {run_dir}\nNext: qlora-train export {run_dir} --to merged")


def _plan(args: argparse.Namespace) -> None:
    overrides = [*args.overrides, *([f"memory.vram={args.vram}"] if args.vram else [])]
    recipe = load_recipe(args.recipe, overrides)
    from qlora_train.plan.command import plan_command

    plan_command(
        recipe,
        card=args.card,
        ram_bytes=args.ram,
        disk_bytes=args.disk,
        as_json=args.json,
        details=args.details,
    )


def _doctor(args: argparse.Namespace) -> None:
    try:
        from qlora_train.doctor.command import doctor_command
    except (ImportError, OSError) as error:  # a shared library that torch lacks, a version that does not fit
        raise QloraTrainError(
            f"libraries cannot be imported ({reason_of(error)}); install them again"
        ) from error

    doctor_command(Path("runs"))


def _preview(args: argparse.Namespace) -> None:
    recipe = load_recipe(args.recipe, args.overrides)
    from qlora_train.recipe_paths import require_paths

    require_paths(recipe)
    from qlora_train.data.preview import preview
    from qlora_train.plan.base_config import find_config
    from qlora_train.plan.words import positions_line
    from qlora_train.weights.cache_key import cache_root

    config = find_config(recipe.model.base, recipe.model.revision)
    positions = config.get("max_position_embeddings")
    preview(
        recipe,
        args.num_rows,
        vocabulary_size=config.get("vocab_size"),
        cache=None if args.no_cache else cache_root(),
        remarks=positions_line(recipe.data.sequence_length, positions) if positions else (),
    )


def _export(args: argparse.Namespace) -> None:
    from qlora_train.export import export

    folder = export(
        args.run_dir,
        to=args.to,
        base=args.base,
        dtype=args.dtype,
        out=args.out,
        checkpoint=args.checkpoint,
        receipt=args.receipt,
        loaders=args.loaders,
        quant=args.quant,
        push_to_hub=args.push_to_hub,
        log=tell,
    )
    tell(str(folder))


def _report(args: argparse.Namespace) -> None:
    from qlora_train.report.write import report_command

    report_command(args.runs, out=args.out, with_base=args.base)


def _list_cache(args: argparse.Namespace) -> None:
    from qlora_train.weights.cache_command import list_cache
    from qlora_train.weights.cache_key import cache_root

    entries = list_cache(cache_root())
    for entry in entries:
        print(entry.line())
    print(f"{sum(entry.num_bytes for entry in entries) / 1e9:8.2f} GB  in {cache_root()}")


def _clear_cache(args: argparse.Namespace) -> None:
    from qlora_train.weights.cache_command import clear_cache
    from qlora_train.weights.cache_key import cache_root

    removed, kept = clear_cache(cache_root(), args.names)
    for entry in kept:
        print(f"{entry.folder.name}: in use, kept")
    print(f"removed {len(removed)}: {sum(entry.num_bytes for entry in removed) / 1e9:.2f} GB")


def _fail(error: QloraTrainError | Interrupted) -> int:
    try:
        sys.stdout.flush()
    except OSError:
        _discard_output()
    text = message(str(error))
    several = isinstance(error, RecipeError) and len(error.problems) > 1
    print("qlora-train:", f"several problems\n{text}" if several else text, file=sys.stderr)
    return error.exit_code
