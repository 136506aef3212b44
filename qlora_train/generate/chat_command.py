"""`qlora-train chat`: talks with a run or a model in the terminal."""

from __future__ import annotations

import contextlib
import signal
import sys
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from pathlib import Path
from types import FrameType

from qlora_train.errors import DataError, QloraTrainError, UserError
from qlora_train.generate.chat import Chat, StopAnswer
from qlora_train.generate.model_folder import ModelSource, find_model
from qlora_train.generate.sampling import Sampling
from qlora_train.plan.planned_walk import GenerateSize
from qlora_train.terminal_text import show, tell

with contextlib.suppress(ImportError):  # arrow keys and history while typing; Windows has none
    import readline  # noqa: F401

BASE = "base"
HELP = """\
/base            what the base says to the last question, without the adapter
/adapter [NAME]  the adapters that are there, or answer with this one from now on
/system TEXT     another system message
/retry           the last question again
/clear           start again
/quit            or /exit, /bye, Ctrl-D
Ctrl-C           ends an answer; what is there then stays in the conversation
A line that ends in \\ goes on. //text says /text."""


def chat_command(
    target: Path | str,
    sampling: Sampling,
    *,
    system: str | None,
    context_tokens: int,
    adapters: Mapping[str, Path],
    checkpoint: str | None,
    vram_bytes: int | None,
) -> None:
    """Read questions from the terminal and stream answers until the input ends. adapters: {name: run} that
    /adapter switches to, trained on the same base. context_tokens: of the conversation and an answer
    together. Other arguments as of `generate_command`."""
    if context_tokens <= sampling.max_new_tokens:
        raise UserError(
            f"--context {context_tokens} leaves no room for a question beside answers of "
            f"--max-new-tokens {sampling.max_new_tokens}"
        )
    log = partial(tell, stream=sys.stderr)
    source = find_model(target, checkpoint=checkpoint, log=log)
    source.encode_messages([{"role": "user", "content": "Hello"}])  # refused before anything is loaded
    source, named = source.with_adapters(adapters, log)
    size = GenerateSize((context_tokens - sampling.max_new_tokens,), sampling.max_new_tokens)
    model = source.load(size, vram_bytes=vram_bytes, log=log)
    try:
        chat = Chat(model, source, sampling, system=system, context_tokens=context_tokens)
        Terminal(chat, source, named).run()
    finally:
        model.decoder.close()


class Terminal:
    """Reads lines, runs commands, prints answers. adapters: {name: adapter folder}, the first one in use."""

    def __init__(self, chat: Chat, source: ModelSource, adapters: Mapping[str, Path]) -> None:
        self._chat, self._source = chat, source
        self._adapters: dict[str, Path | None] = {**adapters, BASE: None}
        self._in_use = next(iter(self._adapters))

    def run(self) -> None:
        """Until /quit or the end of the input. A user's mistake is printed and changes nothing."""
        print("/help lists commands.", file=sys.stderr)
        for line in _lines():
            if line.strip() in ("/quit", "/exit", "/bye"):
                return
            try:
                self._obey(line)
            except QloraTrainError as error:
                tell(f"qlora-train: {error}", sys.stderr)

    def _obey(self, line: str) -> None:
        if not line.strip():
            return
        if not line.startswith("/") or line.startswith("//"):
            self._write_answer(partial(self._chat.ask, line.removeprefix("/")))
            if left_out := self._chat.num_left_out:
                print(f"(the first {left_out} exchanges no longer fit into --context)", file=sys.stderr)
            return
        name, _, argument = line[1:].strip().partition(" ")
        commands: dict[str, Callable[[str], None]] = {
            "help": lambda _: print(HELP),
            "base": self._base,
            "adapter": self._adapter,
            "system": self._system,
            "retry": lambda _: self._write_answer(self._chat.retry),
            "clear": self._clear,
        }
        if name not in commands:
            raise DataError(f"/{name} is no command; /help lists them, //{name} says it")
        commands[name](argument.strip())

    def _base(self, _: str) -> None:
        self._write_answer(partial(self._chat.base_answer, self._adapters[self._in_use]), "it is not kept")

    def _adapter(self, name: str) -> None:
        if not name:
            for known in self._adapters:
                print(f"{'*' if known == self._in_use else ' '} {known}")
            return
        if name not in self._adapters:
            raise DataError(f"{name}: no such adapter; there are {', '.join(self._adapters)}")
        self._source.attach(self._chat.model.decoder, self._adapters[name])
        self._in_use = name

    def _system(self, text: str) -> None:
        self._chat.system = text or None

    def _clear(self, _: str) -> None:
        self._chat.messages = []

    def _write_answer(
        self,
        answer: Callable[[Callable[[str], None]], None],
        of_a_cut_one: str = "it stays in the conversation as it is, /retry answers anew",
    ) -> None:
        """Print an answer as it comes. of_a_cut_one: what becomes of one that Ctrl-C ends, in words."""
        with _ctrl_c_ends_the_answer() as check:

            def write(text: str) -> None:
                show(text)
                check()

            answer(write)
        print("\n")
        if self._chat.was_cut:
            print(f"(Ctrl-C cut this answer: {of_a_cut_one})", file=sys.stderr)


def _lines() -> Iterator[str]:
    """Questions, which may go over several lines; `> ` asks for one where somebody sits at a terminal."""
    prompt = "> " if sys.stdin.isatty() else ""
    with contextlib.suppress(EOFError):
        while True:
            line = input(prompt)
            while line.endswith("\\"):
                line = line[:-1] + "\n" + input("  " if prompt else "")
            yield line


@contextlib.contextmanager
def _ctrl_c_ends_the_answer() -> Iterator[Callable[[], None]]:
    """While the block runs, a first Ctrl-C is raised as `StopAnswer` by the function that is yielded, between
    two tokens; a second one ends the command at once."""
    received = False
    previous = signal.getsignal(signal.SIGINT)

    def note(number: int, frame: FrameType | None) -> None:
        nonlocal received
        if received and callable(previous):
            previous(number, frame)
        received = True

    def check() -> None:
        nonlocal received
        if received:
            received = False
            raise StopAnswer

    signal.signal(signal.SIGINT, note)
    try:
        yield check
    finally:
        signal.signal(signal.SIGINT, previous)
