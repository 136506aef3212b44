"""What stands beside merged weights: copied by name, only from inside the base, without code."""

from __future__ import annotations

import json
from pathlib import Path

import torch

from qlora_train.export.companions import copy_companions, merged_config
from qlora_train.quant.formats import Quantization

COPIED = {
    *(
        "LICENSE",
        "LICENSE.txt",
        "NOTICE",
        "README.md",
        "USE_POLICY.md",
        "tokenizer.json",
        "tokenizer_config.json",
    ),
    *("tokenizer.model.v3", "tokenizer.model", "merges.txt", "qwen.tiktoken", "chat_template.jinja"),
    *("preprocessor_config.json", "generation_config.json", "added_tokens.json"),
}
LEFT = {
    *("modeling_x.py", "adapter_config.json", "adapter_model.safetensors", "model.safetensors.index.json"),
    *("quantize_config.json", "pytorch_model.bin", "config.json", ".gitattributes"),
}


def copied(base: Path, out: Path) -> tuple[set[str], list[str]]:
    out.mkdir()
    said: list[str] = []
    copy_companions(base, out, said.append)
    return {str(path.relative_to(out)) for path in out.rglob("*") if path.is_file()}, said


def test_which_files(tmp_path: Path) -> None:
    base = tmp_path / "base"
    (base / "additional_chat_templates").mkdir(parents=True)
    (base / "original").mkdir()
    for name in (*COPIED, *LEFT, "additional_chat_templates/rag.jinja", "original/params.json"):
        (base / name).write_text("{}")
    found, said = copied(base, tmp_path / "out")
    assert found == COPIED | {"additional_chat_templates/rag.jinja"} and said == []


def test_links_lead_nowhere_else(tmp_path: Path) -> None:
    """A file, a folder of templates; in the hub cache the blobs beside a snapshot are the base's own."""
    secret = tmp_path / "home"
    secret.mkdir()
    (secret / "id_rsa").write_text("SECRET")
    snapshot = tmp_path / "models--a--b" / "snapshots" / "c0ffee"
    blobs = tmp_path / "models--a--b" / "blobs"
    snapshot.mkdir(parents=True)
    blobs.mkdir()
    (blobs / "1").write_text("license")
    (snapshot / "LICENSE").symlink_to("../../blobs/1")
    (snapshot / "notes.txt").symlink_to(secret / "id_rsa")
    (snapshot / "additional_chat_templates").symlink_to(secret)
    found, said = copied(snapshot, tmp_path / "out")
    assert found == {"LICENSE"}
    assert [line.partition(",")[0] for line in said] == [
        "not copied: notes.txt",
        "not copied: additional_chat_templates/id_rsa",
    ]
    elsewhere = tmp_path / "elsewhere"  # a folder of that name is no hub cache
    elsewhere.mkdir()
    (elsewhere / "LICENSE").symlink_to(blobs / "1")
    assert copied(elsewhere, tmp_path / "out2")[0] == set()


def test_code_is_left_out_and_so_is_what_names_it(tmp_path: Path) -> None:
    base = tmp_path / "base"
    base.mkdir()
    named = {"auto_map": {"AutoTokenizer": ["tok.T", None]}, "bos_token": "é"}
    (base / "tokenizer_config.json").write_text(json.dumps(named))
    (base / "broken.json").write_text("{")
    copied(base, tmp_path / "out")
    assert json.loads((tmp_path / "out" / "tokenizer_config.json").read_text("utf-8")) == {"bos_token": "é"}
    assert (tmp_path / "out" / "broken.json").read_text() == "{"
    config = {"model_type": "x", "auto_map": {"AutoConfig": "c.C"}, "quantization_config": {}}
    nf4 = Quantization("nf4")
    merged = json.loads(merged_config(config, torch.float16, nf4, unties_head=False, vocabulary_size=9))
    mark = {"merged_onto": "dequantized", "quantization": "nf4"}
    assert merged == {"model_type": "x", "dtype": "float16", "torch_dtype": "float16", "qlora_train": mark}
    parts = {"tie_word_embeddings": True, "text_config": {"vocab_size": 8, "hidden_size": 4}}
    untied = json.loads(merged_config(parts, torch.float16, None, unties_head=True, vocabulary_size=9))
    assert untied["text_config"] == {"vocab_size": 9, "hidden_size": 4}
    assert untied["tie_word_embeddings"] is False and untied["qlora_train"] == {"merged_onto": "original"}
