"""Folders with tokenizer.model alone (the first Llama, Vicuna and Mistral repositories)."""

from __future__ import annotations

import io
import json
from pathlib import Path

import pytest
import sentencepiece

from qlora_train.data.tokenizer import load_tokenizer

TEXTS = [f"the quick fox number {i} jumps over the lamp of the row" for i in range(200)]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder, model = tmp_path_factory.mktemp("base"), io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(TEXTS),
        model_writer=model,
        vocab_size=320,
        model_type="bpe",
        byte_fallback=True,
        pad_id=-1,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        num_threads=1,
        minloglevel=2,
    )
    (folder / "tokenizer.model").write_bytes(model.getvalue())
    special = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    (folder / "tokenizer_config.json").write_text(
        json.dumps({"tokenizer_class": "LlamaTokenizer", "add_bos_token": True, "legacy": False} | special)
    )
    return folder


@pytest.mark.parametrize("text", ["the lamp of the row", "öäü 日本", "fox\n\tfox"])
def test_the_tokens_are_sentencepieces_own(folder: Path, text: str) -> None:
    reference = sentencepiece.SentencePieceProcessor(model_file=str(folder / "tokenizer.model"))
    tokenizer = load_tokenizer(str(folder))
    assert tokenizer(text)["input_ids"] == [reference.bos_id(), *reference.encode(text)]
