"""The way from nothing to Ollama in README.md: its commands, as they stand there."""

from __future__ import annotations

import shlex
from pathlib import Path

import pytest
from tiny_runs import PROJECT

from qlora_train.cli import main


def test_the_way_to_ollama_runs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """All but the two commands of Ollama; what those are given is there."""
    readme = (PROJECT / "README.md").read_text(encoding="utf-8")
    walk, ollama = readme.partition("<!-- walk -->\n```\n")[2].split("\n```\n```\n", 1)
    monkeypatch.chdir(tmp_path)
    commands = [shlex.split(line, comments=True) for line in walk.splitlines()]
    assert len(commands) >= 10 and all(words[0] == "qlora-train" for words in commands)
    for words in commands:
        assert main(words[1:]) == 0, (words, capsys.readouterr().err)
    said = capsys.readouterr().out
    assert "receipt on" in said and "exact match" in said
    for words in (shlex.split(line) for line in ollama.partition("```")[0].splitlines()):
        assert words[0] == "ollama"
        if "-f" in words:
            modelfile = tmp_path / words[words.index("-f") + 1]
            source = modelfile.read_text().partition("FROM ")[2].split()[0]
            assert (modelfile.parent / source).is_file()
    assert (tmp_path / "runs" / "quickstart" / "report.html").is_file()
