"""The text side of generation: streaming of split characters, and what a folder is taken for."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from tiny_models import write_checkpoint
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from qlora_train.cli import main
from qlora_train.errors import RunFolderError
from qlora_train.generate.command import TextStream
from qlora_train.generate.model_folder import find_model


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {"<pad>": 0, "<bos>": 1, "<eos>": 2} | {c: i + 3 for i, c in enumerate(alphabet)}
    backend = Tokenizer(models.BPE(vocabulary, []))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, bos_token="<bos>", eos_token="<eos>", pad_token="<pad>"
    )


def test_stream_writes_characters_only_when_complete(tokenizer: PreTrainedTokenizerFast) -> None:
    text = "aé漢🙂!"
    written: list[str] = []
    stream = TextStream(tokenizer, written.append)
    for token in tokenizer(text, add_special_tokens=False).input_ids:
        stream.add(token)
    stream.finish()
    assert "".join(written) == text
    assert [piece for piece in written if piece] == list(text)  # one byte a token, one write a character


def test_stream_ends_with_what_was_cut_off(tokenizer: PreTrainedTokenizerFast) -> None:
    written: list[str] = []
    stream = TextStream(tokenizer, written.append)
    for token in tokenizer("a漢", add_special_tokens=False).input_ids[:-1]:
        stream.add(token)
    assert "".join(written) == "a"
    stream.finish()
    assert "".join(written) == "a\ufffd"


def test_generates_from_a_plain_model_folder(
    tmp_path: Path, tokenizer: PreTrainedTokenizerFast, capsys: pytest.CaptureFixture[str]
) -> None:
    write_checkpoint(tmp_path, vocab_size=len(tokenizer))
    tokenizer.save_pretrained(tmp_path)
    arguments = ["generate", str(tmp_path), "--prompt", "ab", "--prompt", "c", "--max-new-tokens", "4"]
    assert main(arguments) == 0
    first = capsys.readouterr().out
    assert first.startswith("> ab\n") and "> c\n" in first
    assert main(arguments) == 0
    assert capsys.readouterr().out == first


def test_stop_tokens_come_from_tokenizer_and_generation_config(
    tmp_path: Path, tokenizer: PreTrainedTokenizerFast
) -> None:
    write_checkpoint(tmp_path, vocab_size=len(tokenizer))
    tokenizer.save_pretrained(tmp_path)
    (tmp_path / "generation_config.json").write_text(json.dumps({"eos_token_id": [7, 9]}))
    assert find_model(tmp_path).stop_ids() == {2, 7, 9}


def test_the_turn_end_of_the_chat_template_stops_too(
    tmp_path: Path, tokenizer: PreTrainedTokenizerFast
) -> None:
    write_checkpoint(tmp_path, vocab_size=len(tokenizer))
    tokenizer.save_pretrained(tmp_path)
    (tmp_path / "chat_template.jinja").write_text(
        "{% for m in messages %}{{ m.content + '<pad>\n' }}{% endfor %}"
    )
    assert find_model(tmp_path).stop_ids() == {0, 2}


@pytest.mark.parametrize(
    "options",
    [
        ["--prompt", "a", "--temperature", "1", "--top-p", "0"],
        ["--prompt", "a", "--temperature", "1", "--seed", "-1"],
        ["--prompt", "a", "--temperature", "1", "--seed", str(2**64)],
        ["--prompt", "", "--raw"],
    ],
)
def test_what_cannot_be_generated_is_one_message(
    tmp_path: Path,
    tokenizer: PreTrainedTokenizerFast,
    capsys: pytest.CaptureFixture[str],
    options: list[str],
) -> None:
    write_checkpoint(tmp_path, vocab_size=len(tokenizer))
    tokenizer.save_pretrained(tmp_path)
    try:
        code = main(["generate", str(tmp_path), *options])
    except SystemExit as stop:  # of argparse
        code = int(stop.code or 0)
    assert code == 2
    assert "qlora-train" in capsys.readouterr().err


def test_a_run_without_an_adapter_says_so(tmp_path: Path) -> None:
    (tmp_path / "recipe.yaml").write_text("model: {base: somewhere}\ndata: {train: x.jsonl}\n")
    with pytest.raises(RunFolderError, match="no adapter yet"):
        find_model(tmp_path)
