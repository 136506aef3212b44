"""Chat templates that never end, or write without end: one message each, in bounded time and memory."""

from __future__ import annotations

import json
import os
import resource
import signal
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from chat_kinds import bot, make_tokenizer, user

from qlora_train.data import expendable
from qlora_train.data.building import build_dataset
from qlora_train.data.chat import template as chat_template
from qlora_train.data.chat.chat_format import ChatFormat
from qlora_train.data.chat.choice import BUILT_IN
from qlora_train.data.chat.template import ChatProblem, ChatTemplate
from qlora_train.data.expendable import within_limits
from qlora_train.errors import DataError, OutOfMemory
from qlora_train.recipe import DataSection

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="memory is limited on Linux only")
EXCHANGE = [user("q"), bot("a")]
TURNS = "{% for m in messages %}{{ m.role[0] + ':' + m.content + '<|end|>\n' }}{% endfor %}"
DOUBLED = "{% set ns = namespace(a=['x'], b=['x']) %}{% for i in range(60) %}{% set ns.a = [ns.a, ns.a] %}"
FOREVER = "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}"


@pytest.fixture(autouse=True)
def small_limits(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """In a child that begins and ends with the test."""
    monkeypatch.setattr(expendable, "_child", None)
    monkeypatch.setattr(expendable, "SECONDS_AT_ONCE", 1.0)
    monkeypatch.setattr(expendable, "_seconds_left", 1.0)
    monkeypatch.setattr(expendable, "SECONDS_A_CALL", 0.02)
    monkeypatch.setattr(expendable, "MAX_BYTES", 2**27)
    monkeypatch.setattr(chat_template, "_MAX_CHARACTERS", 10**6)
    yield
    if expendable._child is not None:
        expendable._child.end()


def render(source: str) -> str:
    return ChatTemplate(source, make_tokenizer(source)).render(EXCHANGE)


@pytest.mark.parametrize(
    ("source", "message"),
    [
        (FOREVER, "too slow: writing a text may take"),
        ("{{ 10 ** (10 ** 9) }}", "too slow"),  # also while it is compiled, within one call into C
        (DOUBLED + "{% set ns.b = [ns.b, ns.b] %}{% endfor %}{{ ns.a == ns.b }}", "too slow"),
        (DOUBLED + "{% endfor %}{{ ns.a | tojson }}", "GiB of memory|too slow"),
        ("{{ 'a' * 10**10 }}", "GiB of memory"),
        ("{{ messages[0].content * 10**10 }}", "GiB of memory"),
        ("{{ '%9999999999d' % 1 }}", "GiB of memory"),
        (
            "{% set ns = namespace(x='a') %}{% for i in range(60) %}{% set ns.x = ns.x ~ ns.x %}{% endfor %}",
            "GiB of memory",
        ),
        ("{{ 'a' * 1000001 }}", "a text of 1,000,001 characters, more than the 1,000,000"),
        ("{{ " + "(" * 10**5 + "1" + ")" * 10**5 + " }}", "nested too deeply"),
        ("{% if true %}" * 10**4 + "{% endif %}" * 10**4, "nested too deeply"),
        ("x" * (2**20 + 1), "has 1,048,577 characters"),
    ],
    ids=lambda text: text[:40],
)
def test_one_message_says_which_limit(source: str, message: str) -> None:
    with pytest.raises(DataError, match=f"The chat template.*({message})"):
        render(source)
    assert render(TURNS) == "u:q<|end|>\na:a<|end|>\n"  # the next one is written


@pytest.mark.parametrize(
    "source",
    [
        "{% macro f(x) %}{{ f(x + 1) }}{% endmacro %}{{ f(1) }}",
        "{% for m in messages recursive %}{{ loop([m]) }}{% endfor %}",
        "{{ raise_exception('x' * 10**6) }}",
    ],
)
def test_the_templates_own_complaint_is_short(source: str) -> None:
    with pytest.raises(ChatProblem, match="refuses the conversation") as caught:
        render(source)
    assert len(str(caught.value)) < 500


def test_a_thousand_slow_texts_are_bounded_too(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(expendable, "SECONDS_A_CALL", 0.001)
    source = "{% for i in range(99999) %}{% endfor %}" * 4
    template = ChatTemplate(source, make_tokenizer(source))
    with pytest.raises(DataError, match="too slow"):
        for _ in range(1000):
            template.render(EXCHANGE)


@pytest.mark.parametrize("rows", [3, 4500])
def test_processes_that_tokenise_are_limited_themselves(tmp_path: Path, rows: int) -> None:
    """Whether one process reads or several."""
    file = tmp_path / "rows.jsonl"
    messages = json.dumps({"messages": EXCHANGE})
    last = json.dumps({"messages": [user("forever"), bot("a")]})
    file.write_text(f"{messages}\n" * rows + last + "\n", encoding="utf-8")
    source = "{% if messages[0].content == 'forever' %}" + FOREVER + "{% endif %}" + TURNS
    section = DataSection.model_validate({"train": str(file), "sequence_length": 64})
    with pytest.raises(DataError, match="too slow"):
        build_dataset(section, make_tokenizer(source), seed=0)
    file.write_text(f"{messages}\n" * rows, encoding="utf-8")
    assert build_dataset(section, make_tokenizer(source), seed=0)[0].examples.num_examples == rows


def test_templates_of_this_program_need_no_process() -> None:
    assert not ChatFormat(make_tokenizer(BUILT_IN["plain"]), ()).runs_templates
    assert ChatTemplate(BUILT_IN["plain"], make_tokenizer(None)).render(EXCHANGE).startswith("User: q")
    assert expendable._child is None
    assert ChatFormat(make_tokenizer(TURNS), ()).runs_templates


def raised() -> None:
    raise LookupError("by the function")


def killed() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def interrupted() -> int:
    os.kill(os.getppid(), signal.SIGINT)
    return 1


@pytest.fixture
def ctrl_c() -> Iterator[None]:
    """Also where the tests run in the background, which ignores it."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.usefixtures("ctrl_c")
def test_what_becomes_of_the_child() -> None:
    first = within_limits(os.getpid)
    with pytest.raises(LookupError, match="by the function"):
        within_limits(raised)
    assert within_limits(os.getpid) == first != os.getpid()
    with pytest.raises(OutOfMemory, match="was killed"):
        within_limits(killed)
    with pytest.raises(KeyboardInterrupt):
        for _ in range(1000):
            within_limits(interrupted)
    assert within_limits(abs, -2) == 2  # not the answer to the interrupted call


def test_limits_are_those_of_the_call_only(monkeypatch: pytest.MonkeyPatch) -> None:
    def limits() -> tuple[int, float]:
        return resource.getrlimit(resource.RLIMIT_AS)[0], signal.getitimer(signal.ITIMER_PROF)[0]

    monkeypatch.setattr(expendable, "_is_expendable", True)
    before = limits()
    num_bytes, seconds = within_limits(limits)
    assert 0 < num_bytes < 2**50 and 0.5 < seconds < 1.05
    assert limits() == before == (before[0], 0)
