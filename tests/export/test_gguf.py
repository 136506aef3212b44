"""GGUF files: tokens in llama.cpp itself, what stands beside them, and what is refused or undone."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import gguf
import pytest
from gguf_runs import GEMMA2, MODELS, YARN, write_run
from gguf_tokenizers import (
    BYTE_LEVEL_CUTS,
    HARD_TEXT,
    TEMPLATE,
    byte_level_bpe,
    gemma4_bpe,
    sentencepiece_bpe,
)
from llama_cpp_server import LlamaCpp
from tiny_runs import CHAT_TEMPLATE, byte_tokenizer
from tokenizers import Tokenizer
from torch import Tensor
from transformers import PreTrainedTokenizerFast

from qlora_train.errors import ExportError
from qlora_train.export import export, export_run
from qlora_train.export.gguf import export_gguf, tensors
from qlora_train.export.gguf.ollama import TurnTexts
from qlora_train.export.gguf.tokenizer import GgufTokenizer

_OF_BYTES = {"trim_offsets": True, "use_regex": True}
_BYTES = {"type": "ByteLevel", "trim_offsets": True, "use_regex": False, "add_prefix_space": False}
_SPLIT = {"type": "Split", "pattern": {"Regex": "a+"}, "behavior": "Isolated", "invert": False}


@pytest.mark.parametrize(
    "kind", [*BYTE_LEVEL_CUTS, "sentencepiece", "sentencepiece without prefix", "gemma4"]
)
def test_llama_cpp_tokenises_the_same(tmp_path: Path, kind: str) -> None:
    family, changes = MODELS["gemma4"] if kind == "gemma4" else ("llama", {"num_hidden_layers": 1})
    if kind == "gemma4":
        tokenizer = gemma4_bpe()
    elif kind in BYTE_LEVEL_CUTS:
        tokenizer = byte_level_bpe(kind)
    else:
        tokenizer = sentencepiece_bpe(with_prefix=kind == "sentencepiece")
    run = write_run(tmp_path, family, tokenizer, **changes)
    said: list[str] = []
    llama_cpp = LlamaCpp(export(run, to="gguf", receipt=None, log=said.append) / "model-f16.gguf")
    hard_text = HARD_TEXT
    if kind in ("tekken", "gpt-4o", "o200k_harmony"):
        assert any("words in capitals" in line for line in said)
        hard_text = hard_text.replace("ÉCOLE", "École").replace("e\u0301", "é")
    for text in (hard_text, *hard_text.splitlines(), "<|user|>Hi<|end|>\n<think> x"):
        assert llama_cpp.token_ids(text) == tokenizer(text).input_ids, text
    chat = [{"role": "user", "content": "Add 2 and 3."}, {"role": "assistant", "content": "5"}]
    chat.append({"role": "user", "content": "Thanks, that's it"})
    wanted = tokenizer.apply_chat_template(chat, add_generation_prompt=True, tokenize=False)
    assert (
        llama_cpp.token_ids(llama_cpp.prompt(chat))
        == tokenizer(wanted.removeprefix(tokenizer.bos_token)).input_ids
    )


def test_words_that_merges_do_not_make_are_said(tmp_path: Path) -> None:
    """llama.cpp takes words that are tokens without merges only for some cuts."""
    run = write_run(tmp_path, tokenizer=byte_level_bpe("o200k_harmony"), num_hidden_layers=1)
    file = tmp_path / "base" / "tokenizer.json"
    whole = json.loads(file.read_text())
    lost = next(pair for pair in reversed(whole["model"]["merges"]) if "".join(pair).isascii())
    whole["model"]["merges"].remove(lost)
    file.write_text(json.dumps(whole))
    said: list[str] = []
    export(run, to="gguf", receipt=None, log=said.append)
    (line,) = (line for line in said if "become several" in line)
    assert repr("".join(lost)) in line


def test_bytes_without_merges(tmp_path: Path) -> None:
    """The tokenizer of the quickstart's base, which llama.cpp would not load without any merge."""
    tokenizer = byte_tokenizer()
    run = write_run(tmp_path, tokenizer=tokenizer, num_hidden_layers=1)
    llama_cpp = LlamaCpp(export(run, to="gguf", receipt=None) / "model-f16.gguf")
    for text in ("Hi, you!  2+2", "<eos>a<bos>", "<eos> <eos>"):
        assert llama_cpp.token_ids(text) == tokenizer(text).input_ids


def test_answers_end_where_training_ended_them(tmp_path: Path) -> None:
    run = write_run(tmp_path)
    folder = export(run, to="gguf", receipt=None)
    fields = gguf.GGUFReader(folder / "model-f16.gguf").fields
    tokenizer = byte_level_bpe()
    assert fields["tokenizer.ggml.eos_token_id"].contents() == tokenizer.eos_token_id
    assert fields["tokenizer.ggml.eot_token_id"].contents() == tokenizer.convert_tokens_to_ids("<|end|>")
    modelfile = (folder / "Modelfile").read_text()
    assert 'PARAMETER stop "<|end|>"' in modelfile and 'PARAMETER stop "<eos>"' in modelfile
    assert modelfile.startswith("# ollama create run -f Modelfile\nFROM ./model-f16.gguf\n")
    assert modelfile.count("<bos>") == 0  # llama.cpp puts it there
    start = "{{ if not .System }}<|user|>Be brief.<|end|>\n{{ end }}"
    user = '{{ if eq .Role "user" }}<|user|>{{ .Content }}<|end|>\n'
    assert f'TEMPLATE """{start}{{{{ range .Messages }}}}{user}' in modelfile


def test_what_stands_beside_the_file(tmp_path: Path) -> None:
    run = write_run(tmp_path)
    (tmp_path / "base" / "LICENSE").write_text("do good")
    (tmp_path / "base" / "README.md").write_text("---\nlicense: apache-2.0\ntags: [x]\n---\n# The base\n")
    said: list[str] = []
    folder = export(run, to="gguf", quant="f16", receipt=None, log=said.append)
    names = {path.name for path in folder.iterdir()}
    assert names == {"model-f16.gguf", "Modelfile", "README.md", "LICENSE"}
    card = (folder / "README.md").read_text()
    assert "license: apache-2.0" in card and "rows.jsonl" in card and "rank 4" in card
    assert str(tmp_path) not in card + (folder / "Modelfile").read_text()
    assert any("llama-quantize model-f16.gguf model-Q4_K_M.gguf Q4_K_M" in line for line in said)


def test_prompts_that_are_no_chats(tmp_path: Path) -> None:
    rows = [{"a": "2 + 2", "b": "4"}] * 4
    data = {"prompt_template": "Q: {a}\nA: ", "columns": {"completion": "b"}}
    run = write_run(tmp_path, rows=rows, data=data)
    said: list[str] = []
    folder = export(run, to="gguf", receipt=None, log=said.append)
    assert 'TEMPLATE """Q: {{ .Prompt }}\nA: """' in (folder / "Modelfile").read_text()
    assert any("-no-cnv" in line for line in said)


@pytest.mark.parametrize(
    "template,derived",
    [
        (TEMPLATE, True),
        (CHAT_TEMPLATE, True),
        ("{% for m in messages %}{{ loop.index }}{{ m.content }}{% endfor %}", False),
        ("{% for m in messages %}{{ m.content | upper }}{% endfor %}", False),
    ],
)
def test_a_template_is_written_anew_only_where_it_is_text_around_messages(
    template: str, derived: bool
) -> None:
    tokenizer = byte_tokenizer(None)

    def render(messages: Any) -> str:
        return str(
            tokenizer.apply_chat_template(
                messages, chat_template=template, tokenize=False, add_generation_prompt=True
            )
        )

    assert (TurnTexts.read_off(render, ["<|end|>", "<eos>"]) is not None) == derived


def test_a_window_that_llama_cpp_lacks_bounds_the_context(tmp_path: Path) -> None:
    run = write_run(tmp_path, "mistral", sliding_window=8)
    said: list[str] = []
    folder = export(run, to="gguf", receipt=None, log=said.append)
    assert gguf.GGUFReader(folder / "model-f16.gguf").fields["llama.context_length"].contents() == 8
    assert any(line.startswith("context: 8 tokens") for line in said)


@pytest.mark.parametrize(
    "family,changes,message",
    [
        ("cohere", {}, "the family cohere"),
        ("gemma2", GEMMA2 | {"query_pre_attn_scalar": 144}, "query_pre_attn_scalar 144"),
        ("gemma2", GEMMA2 | {"layer_types": ["full_attention"] * 3}, "order of layers"),
        ("gemma2", GEMMA2 | {"final_logit_softcapping": None}, "caps on these logits"),
        ("smollm3", {"no_rope_layers": [1, 0, 1]}, "no_rope_layers"),
        ("qwen2", {"rope_parameters": YARN | {"attention_factor": 3.0}}, "attention_factor"),
        ("qwen3", {"attention_bias": True}, r"_proj\.bias"),
        ("llama", {"hidden_act": "relu"}, "activation relu"),
        ("qwen3_moe", {}, "norm_topk_prob False in qwen3_moe"),
        ("qwen3_moe", {"norm_topk_prob": True, "mlp_only_layers": [1]}, r"layers\.1\.mlp\.\w+_proj"),
        ("olmoe", {"clip_qkv": 8.0}, "clip_qkv 8.0"),
        ("gpt_oss", {"swiglu_limit": 5.0}, "swiglu_limit 5.0"),
        ("ministral3", {"rope_parameters": YARN | {"mscale_all_dim": 0.7}}, "mscale_all_dim: 0.7"),
        ("exaone4", {"sliding_window": 8}, "sliding_window 8"),
        ("gemma4_text", MODELS["gemma4"][1] | {"use_bidirectional_attention": "all"}, "bidirectional"),
    ],
)
def test_other_models_are_refused_by_name(
    tmp_path: Path, family: str, changes: dict[str, Any], message: str
) -> None:
    run = write_run(tmp_path, family, **changes)
    with pytest.raises(ExportError, match=message + ".*--to merged.*convert_hf_to_gguf"):
        export(run, to="gguf", receipt=None)
    assert sorted(path.name for path in run.iterdir()) == ["adapter", "recipe.yaml"]


def test_other_tokenizers_are_refused_by_name(tmp_path: Path) -> None:
    run = write_run(tmp_path)
    file = tmp_path / "base" / "tokenizer.json"
    whole = json.loads(file.read_text())
    for change, message in (
        ({"pre_tokenizer": {"type": "Whitespace"}}, "Whitespace"),
        ({"normalizer": {"type": "Lowercase"}}, "changes texts.*Lowercase"),
        (
            {"pre_tokenizer": {"type": "ByteLevel", **_OF_BYTES, "add_prefix_space": True}},
            "ByteLevel.*prefix",
        ),
        ({"pre_tokenizer": {"type": "Sequence", "pretokenizers": [_SPLIT, _BYTES]}}, "cuts texts by"),
    ):
        file.write_text(json.dumps(whole | change))
        with pytest.raises(ExportError, match=message):
            export(run, to="gguf", receipt=None)
    assert sorted(path.name for path in run.iterdir()) == ["adapter", "recipe.yaml"]


def test_tokens_across_a_newline_are_refused_for_gemma4(tmp_path: Path) -> None:
    tokenizer = gemma4_bpe()
    whole = json.loads(tokenizer.backend_tokenizer.to_str())
    whole["model"]["vocab"]["a\n"] = len(tokenizer)
    whole["model"]["merges"].append(["a", "\n"])
    changed = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer.from_str(json.dumps(whole)), bos_token="<bos>", eos_token="<eos>"
    )
    with pytest.raises(ExportError, match=r"a tokenizer with the token 'a\\n'"):
        GgufTokenizer(changed, len(changed), [changed.eos_token_id], tmp_path, is_gemma4=True)


@pytest.mark.parametrize("error", [KeyboardInterrupt, OSError])
def test_an_export_that_fails_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: type[BaseException]
) -> None:
    run = write_run(tmp_path)

    def fail(*arguments: Any) -> None:
        assert any(path.suffix == ".gguf" for path in run.rglob("*"))  # it was being written
        raise error

    monkeypatch.setattr(export_gguf, "compare_with_merged", fail)
    with pytest.raises(error):
        export(run, to="gguf", receipt=None)
    assert sorted(path.name for path in run.iterdir()) == ["adapter", "recipe.yaml"]


def test_a_file_that_is_not_what_was_merged_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = write_run(tmp_path)
    quantized = tensors.GgufTensor.quantized

    def lose_one_byte(tensor: tensors.GgufTensor, rows: Tensor) -> memoryview:
        data = bytearray(quantized(tensor, rows))
        if tensor.name == "blk.1.ffn_up.weight":
            data[1] ^= 0x40
        return memoryview(data)

    monkeypatch.setattr(tensors.GgufTensor, "quantized", lose_one_byte)
    with pytest.raises(ExportError, match=r"layers\.1\.mlp\.up_proj\.weight: read back"):
        export(run, to="gguf", receipt=None)


def test_arguments_that_do_not_fit_are_errors(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = write_run(tmp_path)
    with pytest.raises(ExportError, match=r"llama-quantize model-f16\.gguf model-q4_k_m\.gguf Q4_K_M"):
        export(run, to="gguf", quant="q4_k_m")
    with pytest.raises(ExportError, match="--to gguf writes"):
        export(run, quant="f16")
    with pytest.raises(ExportError, match="--dtype and --for"):
        export(run, to="gguf", dtype="float16")
    export(run, to="gguf", receipt=None)
    with pytest.raises(ExportError, match="not an empty folder"):
        export(run, to="gguf", receipt=None)
    monkeypatch.setattr(export_run, "find_spec", lambda name: None)
    with pytest.raises(ExportError, match="pip install 'gguf"):
        export(run, to="gguf", quant="q8_0", receipt=None)
