"""Conversations in the terminal: what the model is given, the commands, and adapters switched in place."""

from __future__ import annotations

import io
import json
import os
import signal
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from tiny_runs import byte_tokenizer, write_base, write_rows

from qlora_train import Recipe, train
from qlora_train.cli import main
from qlora_train.errors import DataError
from qlora_train.generate.chat import Chat, StopAnswer
from qlora_train.generate.chat_command import Terminal
from qlora_train.generate.decoding import generate_tokens
from qlora_train.generate.model_folder import LoadedModel, ModelSource, find_model
from qlora_train.generate.sampling import Sampling
from qlora_train.plan.planned_walk import GenerateSize

TEMPLATE = (
    "{% for m in messages %}{{ '[' + m.role + ']' + m.content + eos_token }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '[assistant]' }}{% endif %}"
)
SAMPLING = Sampling(4)
ROOM = GenerateSize((200,), 4)


def chat_rows() -> list[dict[str, object]]:
    return [
        {"messages": [{"role": "user", "content": f"{n}?"}, {"role": "assistant", "content": f"{n}!"}]}
        for n in range(16)
    ]


def trained(base: Path, rows: Path, run: Path, rank: int) -> Path:
    recipe = Recipe.from_dict(
        {
            "model": {"base": str(base), "compute_dtype": "float32"},
            "lora": {"rank": rank, "alpha": 4 * rank},
            "data": {"train": str(rows), "sequence_length": 64},
            "training": {
                "output_dir": str(run),
                "max_steps": 3,
                "batch_size": 2,
                "learning_rate": 0.05,
                "seed": rank,
            },
        }
    )
    return train(recipe).run_dir


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """Two runs on one base, with adapters of different rank."""
    folder = tmp_path_factory.mktemp("chats")
    base = write_base(folder / "base")
    byte_tokenizer(TEMPLATE).save_pretrained(base)
    rows = write_rows(folder / "rows.jsonl", chat_rows())
    return trained(base, rows, folder / "first", 2), trained(base, rows, folder / "second", 6)


@pytest.fixture(scope="module")
def source(runs: tuple[Path, Path]) -> ModelSource:
    return find_model(runs[0])


@pytest.fixture
def model(source: ModelSource) -> LoadedModel:
    return source.load(ROOM)


def answer_of(model: LoadedModel, text: str) -> str:
    """What the model says after a text, which is tokenised as a template's text is."""
    tokens = byte_tokenizer()(text, add_special_tokens=True).input_ids
    (answer,) = generate_tokens(model.decoder, [tokens], SAMPLING, model.stop_ids)
    return byte_tokenizer().decode(answer, skip_special_tokens=True)


def new_chat(model: LoadedModel, source: ModelSource, system: str | None = None, context: int = 200) -> Chat:
    return Chat(model, source, SAMPLING, system=system, context_tokens=context)


def said(chat: Chat, question: str) -> str:
    pieces: list[str] = []
    chat.ask(question, pieces.append)
    return "".join(pieces)


def test_every_turn_is_given_the_whole_conversation_as_training_writes_it(
    model: LoadedModel, source: ModelSource
) -> None:
    chat = new_chat(model, source, system="be brief")
    start = "[system]be brief<eos>[user]one<eos>[assistant]"
    first = said(chat, "one")
    assert first == answer_of(model, start)
    assert said(chat, "two") == answer_of(model, f"{start}{first}<eos>[user]two<eos>[assistant]")
    assert [m["content"] for m in chat.messages[::2]] == ["one", "two"]


def test_the_oldest_exchange_is_left_out_first(model: LoadedModel, source: ModelSource) -> None:
    chat = new_chat(model, source, system="s", context=80)
    for question in ("aaaaaaaaaa", "bbbbbbbbbb"):
        said(chat, question)
    assert chat.num_left_out == 0
    second = chat.messages[-1]["content"]
    text = f"[system]s<eos>[user]bbbbbbbbbb<eos>[assistant]{second}<eos>[user]cccccccccc<eos>[assistant]"
    answer = said(chat, "cccccccccc")
    assert chat.num_left_out == 1 and answer == answer_of(model, text)


def test_a_question_that_does_not_fit_changes_nothing(model: LoadedModel, source: ModelSource) -> None:
    chat = new_chat(model, source, context=60)
    said(chat, "a")
    before = list(chat.messages)
    with pytest.raises(DataError, match="room for 56"):
        said(chat, "b" * 60)
    assert chat.messages == before


def test_a_stopped_answer_is_what_was_written(model: LoadedModel, source: ModelSource) -> None:
    chat, written = new_chat(model, source), []

    def write(text: str) -> None:
        written.append(text)
        if len(written) == 2:
            raise StopAnswer

    chat.ask("one", write)
    assert chat.messages[-1]["content"] == "".join(written)
    assert len("".join(written)) < len(said(new_chat(model, source), "one"))


def typed(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], text: str, *arguments: str
) -> tuple[int, str, str]:
    monkeypatch.setattr(sys, "stdin", io.StringIO(text))
    capsys.readouterr()
    code = main(["chat", *arguments, "--max-new-tokens", "4", "--context", "200"])
    found = capsys.readouterr()
    return code, found.out, found.err


def test_adapters_are_switched_in_place(
    runs: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    first, second = runs
    questions = (
        "hello\n/base\n/adapter second\n/retry\n/adapter base\n/retry\n/adapter trained\n/retry\n/quit\n"
    )
    code, out, err = typed(monkeypatch, capsys, questions, str(first), "--adapter", f"second={second}")
    answers = out.split("\n\n")[:-1]
    assert code == 0 and len(answers) == 5
    text = "[user]hello<eos>[assistant]"
    of_runs = [answer_of(find_model(run).load(ROOM), text) for run in runs]
    of_base = answer_of(replace(find_model(first), adapter=None).load(ROOM), text)
    trained_answer, base_answer, second_answer, base_again, trained_again = answers
    assert [trained_answer, second_answer] == of_runs and trained_again == trained_answer
    assert base_answer == base_again == of_base
    assert len({trained_answer, second_answer, base_answer}) == 3


def test_an_adapter_of_another_base_is_refused(
    runs: tuple[Path, Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    base = write_base(tmp_path / "base", seed=9)
    byte_tokenizer(TEMPLATE).save_pretrained(base)
    other = trained(base, write_rows(tmp_path / "rows.jsonl", chat_rows()), tmp_path / "run", 2)
    code, out, err = typed(monkeypatch, capsys, "hello\n", str(runs[0]), "--adapter", f"other={other}")
    assert code == 2 and "its weights differ" in err and not out


def test_commands_and_mistakes(
    runs: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    text = "/nonsense\n/retry\n/adapter nobody\n/adapter\n/help\n\n//said\n/clear\n/system be kind\n"
    text += "two \\\nlines\n"
    code, out, err = typed(monkeypatch, capsys, text, str(runs[0]))
    assert code == 0  # the end of the input is a way to leave
    assert "/nonsense is no command" in err and "Nothing has been asked" in err
    assert "nobody: no such adapter; there are trained, base" in err
    assert "* trained\n  base\n" in out and "Ctrl-D" in out
    model = find_model(runs[0]).load(ROOM)
    answers = out.split("* trained\n  base\n")[1].partition("/text.\n")[2].split("\n\n")
    assert answers[0] == answer_of(model, "[user]/said<eos>[assistant]")
    assert answers[1] == answer_of(model, "[system]be kind<eos>[user]two \nlines<eos>[assistant]")


def test_a_model_without_conversations_is_refused_before_it_is_loaded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    base = write_base(tmp_path / "base", chat_template=None)
    monkeypatch.setattr(ModelSource, "load", lambda *_, **__: pytest.fail("was loaded"))
    code, _, err = typed(monkeypatch, capsys, "hello\n", str(base))
    assert code == 2 and "plain text" in err
    code, _, err = typed(monkeypatch, capsys, "hello\n", str(base), "--max-new-tokens", "200")
    assert code == 2


def test_ctrl_c_ends_the_answer_and_not_the_conversation(
    model: LoadedModel,
    source: ModelSource,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """A signal in the middle of an answer: the conversation goes on with what was written."""
    chat = Chat(model, source, Sampling(60, repetition_penalty=3.0), system=None, context_tokens=200)
    free = io.StringIO()
    chat.ask("one", free.write)
    chat.messages.clear()
    original, calls = model.decoder.logits, []

    def interrupted(x: torch.Tensor) -> torch.Tensor:
        calls.append(1)
        if len(calls) == 3:
            os.kill(os.getpid(), signal.SIGINT)
        return original(x)

    monkeypatch.setattr(model.decoder, "logits", interrupted)
    monkeypatch.setattr(sys, "stdin", io.StringIO("one\n/bye\nnot asked\n"))
    before = signal.getsignal(signal.SIGINT)
    Terminal(chat, source, {}).run()
    out, err = capsys.readouterr()
    written = out.removesuffix("\n\n")
    assert "(Ctrl-C cut this answer: it stays in the conversation as it is" in err
    assert signal.getsignal(signal.SIGINT) is before
    assert 0 < len(written) < len(free.getvalue()) and free.getvalue().startswith(written)
    assert chat.messages[-1] == {"role": "assistant", "content": written}


def test_generate_takes_files_systems_and_conversations(
    runs: tuple[Path, Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    messages = [
        {"role": "user", "content": "a"},
        {"role": "assistant", "content": "b"},
        {"role": "user", "content": "c"},
    ]
    file = tmp_path / "prompts.jsonl"
    one = json.dumps({"prompt": "one\u2028"}, ensure_ascii=False)  # no end of a line
    file.write_text(one + "\n\n" + json.dumps({"messages": messages}) + "\n")
    (tmp_path / "lines.txt").write_text("one\n\ntwo\n")
    monkeypatch.setattr(sys, "stdin", io.StringIO("all\nof it"))
    common = ["generate", str(runs[0]), "--max-new-tokens", "4", "--system", "s"]
    arguments = [*common, "--file", str(file), "--stdin", "--batch-size", "2", "--json"]
    assert main(arguments) == 0
    rows = [json.loads(line) for line in capsys.readouterr().out.split("\n")[:-1]]
    model, start = find_model(runs[0]).load(ROOM), "[system]s<eos>[user]"
    assert [row["answer"] for row in rows] == [
        answer_of(model, f"{start}one\u2028<eos>[assistant]"),
        answer_of(model, f"{start}a<eos>[assistant]b<eos>[user]c<eos>[assistant]"),
        answer_of(model, f"{start}all\nof it<eos>[assistant]"),
    ]
    assert rows[0]["prompt"] == "one\u2028" and rows[1]["messages"] == messages
    assert main([*common, "--file", str(tmp_path / "lines.txt")]) == 0
    out = capsys.readouterr().out
    assert out.startswith("> one\n") and "\n> two\n" in out


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("", "holds no prompts"),
        ("{", "line 1: is no JSON"),
        ('{"text": "a"}', "line 1: Write"),
        ('{"prompt": "a"}\n{"prompt": 3}', "line 2: Write"),
        ('{"messages": [{"role": "user"}]}', "line 1: Write"),
        ('{"messages": [{"role": "assistant", "content": "a"}]}', "ends with an answer"),
        ("[" * 100_000, "line 1: is no JSON"),
    ],
)
def test_wrong_files_of_prompts(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], content: str, message: str
) -> None:
    file = tmp_path / "prompts.jsonl"
    file.write_text(content)
    assert main(["generate", str(tmp_path), "--file", str(file)]) == 2
    assert message in capsys.readouterr().err


def test_generate_without_a_prompt_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["generate", "somewhere"]) == 2
    assert "--prompt TEXT, --file FILE or --stdin" in capsys.readouterr().err
