"""The commands that answer prompts: `qlora-train generate | chat | eval`. Their options, and what they
call."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from qlora_train.cli.types import (
    count,
    named_path,
    names,
    not_negative,
    number_or_zero,
    positive,
    probability,
    seed,
    share,
    size,
)
from qlora_train.errors import UserError

if TYPE_CHECKING:
    from qlora_train.generate.sampling import Sampling

CHECKPOINT_HELP = "of a run (default: the finished adapter, else the last checkpoint)"
_CONTEXT_TOKENS = 4096

AddCommand = Callable[..., argparse.ArgumentParser]
"""Adds a command by name, help text and defaults, of which `run` is what it calls with its arguments."""


def add_generate(command: AddCommand) -> None:
    """Add `generate`."""
    generate = command("generate", "answer prompts with a run or a merged model", run=_generate)
    _add_model(generate)
    generate.add_argument("--prompt", action="append", default=[], help="may be given several times")
    generate.add_argument(
        "--file",
        type=Path,
        help='prompts: a line of text each, or .jsonl with {"prompt": ...} or {"messages": [...]}',
    )
    generate.add_argument("--stdin", action="store_true", help="what standard input says is one prompt")
    generate.add_argument("--system", metavar="TEXT", help="a system message before each prompt")
    _add_sampling(generate, 128)
    generate.add_argument(
        "--batch-size", type=count, default=16, metavar="N", help="prompts that run together"
    )
    generate.add_argument("--json", action="store_true", help="a line of JSON for each answer")
    generate.add_argument(
        "--raw", action="store_true", help="the prompt as it is, without the run's template"
    )


def add_chat(command: AddCommand) -> None:
    """Add `chat`."""
    chat = command("chat", "talk with a run or a merged model", run=_chat)
    _add_model(chat)
    chat.add_argument("--system", metavar="TEXT", help="a system message before the conversation")
    chat.add_argument(
        "--adapter",
        action="append",
        type=named_path,
        default=[],
        metavar="NAME=RUN",
        help="of another run on the same base, which /adapter NAME switches to; may be given several times",
    )
    chat.add_argument(
        "--context",
        type=count,
        default=_CONTEXT_TOKENS,
        metavar="N",
        help=f"tokens of conversation and answer together (default: {_CONTEXT_TOKENS})",
    )
    _add_sampling(chat, 512)


def add_eval(command: AddCommand) -> None:
    """Add `eval`."""
    evaluate = command("eval", "loss and answers of a run or a model on held-out rows", run=_eval)
    _add_model(evaluate)
    rows = evaluate.add_argument_group("on rows").add_argument
    rows("--data", metavar="FILE", help="rows (default: those that the run holds out)")
    rows(
        "--num-answers",
        type=number_or_zero,
        metavar="N",
        help="rows to answer, for exact match, ROUGE and BLEU (default: the first 100)",
    )
    rows("--max-new-tokens", type=count, metavar="N", help="default: 256")
    tasks = evaluate.add_argument_group("on tasks of EleutherAI's lm-evaluation-harness").add_argument
    tasks("--tasks", type=names, metavar="NAME,NAME", help="tasks or groups, such as arc_easy,hellaswag")
    tasks("--limit", type=count, metavar="N", help="samples of each task (default: all)")
    tasks("--num-fewshot", type=number_or_zero, metavar="N", help="examples (default: the task's own number)")
    tasks(
        "--tasks-folder",
        type=Path,
        metavar="FOLDER",
        help="YAML tasks of your own; Python that they name with !function is run",
    )
    tasks("--apply-chat-template", action="store_true", default=None, help="prompts are conversations")
    evaluate.add_argument("--batch-size", type=count, default=16, metavar="N", help="rows answered together")
    evaluate.add_argument("--base", action="store_true", help="the base's scores beside")
    evaluate.add_argument(
        "--out",
        type=Path,
        metavar="FILE",
        help="prompts, references and answers (of tasks: lm-eval's samples), as .jsonl",
    )
    evaluate.add_argument("--json", action="store_true", help="for programs")


def _add_model(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("target", metavar="RUN_OR_MODEL", help="a run folder or a model folder")
    parser.add_argument("--checkpoint", metavar="best|last|step-N", help=CHECKPOINT_HELP)
    parser.add_argument(
        "--vram",
        type=size,
        metavar="SIZE",
        help="memory to stay within, such as 2GiB (default: what is free)",
    )


def _add_sampling(parser: argparse.ArgumentParser, max_new_tokens: int) -> None:
    parser.add_argument(
        "--max-new-tokens", type=count, default=max_new_tokens, metavar="N", help=f"default: {max_new_tokens}"
    )
    parser.add_argument("--temperature", type=not_negative, default=0.0, help="0 is greedy (default)")
    parser.add_argument("--top-p", type=share, default=1.0, help="above 0, at most 1 (default)")
    parser.add_argument("--top-k", type=number_or_zero, default=0, help="0 is all tokens (default)")
    parser.add_argument(
        "--min-p", type=probability, default=0.0, help="share of the likeliest token's probability; 0: off"
    )
    parser.add_argument("--repetition-penalty", type=positive, default=1.0, help="1 is none (default)")
    parser.add_argument("--seed", type=seed, default=0, help="for --temperature above 0")


def _generate(args: argparse.Namespace) -> None:
    from qlora_train.generate.command import generate_command
    from qlora_train.generate.prompts_file import read_prompts

    prompts = [*args.prompt, *(read_prompts(args.file) if args.file else [])]
    if args.stdin:
        prompts.append(sys.stdin.read())
    if not prompts:
        raise UserError("generate needs a prompt: --prompt TEXT, --file FILE or --stdin")
    generate_command(
        args.target,
        prompts,
        _sampling(args),
        system=args.system,
        raw=args.raw,
        batch_size=args.batch_size,
        as_json=args.json,
        checkpoint=args.checkpoint,
        vram_bytes=args.vram,
    )


def _chat(args: argparse.Namespace) -> None:
    from qlora_train.generate.chat_command import chat_command

    chat_command(
        args.target,
        _sampling(args),
        system=args.system,
        context_tokens=args.context,
        adapters=dict(args.adapter),
        checkpoint=args.checkpoint,
        vram_bytes=args.vram,
    )


def _eval(args: argparse.Namespace) -> None:
    of_rows = ("data", "num_answers", "max_new_tokens")
    of_tasks = ("limit", "num_fewshot", "tasks_folder", "apply_chat_template")
    for name in of_rows if args.tasks else of_tasks:
        if getattr(args, name) is not None:
            does = "is not for tasks, so leave it out or --tasks" if args.tasks else "goes with --tasks"
            raise UserError(f"--{name.replace('_', '-')} {does}")
    chosen = {name: getattr(args, name) for name in (of_tasks if args.tasks else of_rows)}
    from qlora_train.generate.evaluate_command import evaluate_command

    evaluate_command(
        args.target,
        args.tasks or [],
        **{name: value for name, value in chosen.items() if value is not None},
        batch_size=args.batch_size,
        with_base=args.base,
        out=args.out,
        as_json=args.json,
        checkpoint=args.checkpoint,
        vram_bytes=args.vram,
    )


def _sampling(args: argparse.Namespace) -> Sampling:
    from qlora_train.generate.sampling import Sampling

    return Sampling(
        args.max_new_tokens,
        args.temperature,
        args.top_p,
        args.top_k,
        args.min_p,
        args.repetition_penalty,
        args.seed,
    )
