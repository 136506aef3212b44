"""GGUF files against transformers on the merged model, in llama.cpp itself; and what is refused or undone."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import gguf
import pytest
import torch
from gguf_tokenizers import BYTE_LEVEL_CUTS, HARD_TEXT, TEMPLATE, byte_level_bpe, sentencepiece_bpe
from llama_cpp_server import LlamaCpp
from tiny_models import random_model, tiny_config
from tiny_runs import CHAT_TEMPLATE, byte_tokenizer, recipe_values, write_recipe, write_rows
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast

from qlora_train.adapter.adapter_config import AdapterConfig
from qlora_train.adapter.adapter_files import save_adapter
from qlora_train.errors import ExportError
from qlora_train.export import QUANTS, export, export_run
from qlora_train.export.gguf import export_gguf, write
from qlora_train.export.gguf.ollama import TurnTexts

CHATS = [
    {
        "messages": [
            {"role": "user", "content": f"Add {i} and 1."},
            {"role": "assistant", "content": str(i + 1)},
        ]
    }
    for i in range(30)
]
_YARN = {"rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0, "original_max_position_embeddings": 16}
TOKEN_IDS = [(7 * i) % 90 + 3 for i in range(40)]  # beyond windows of 8, original contexts of 16
_OF_BYTES = {"trim_offsets": True, "use_regex": True}
_GEMMA_SIZES = {"head_dim": 16, "query_pre_attn_scalar": 16, "sliding_window": 8}
_CAPS = {"attn_logit_softcapping": 1.0, "final_logit_softcapping": 2.0}  # that bite in a tiny model
MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("llama", {}),
    "llama with biases, tied": (
        "llama",
        {"attention_bias": True, "mlp_bias": True, "tie_word_embeddings": True},
    ),
    "llama 3": ("llama3-rope", {"head_dim": 24}),
    "linear rope": ("llama", {"rope_parameters": {"rope_type": "linear", "rope_theta": 1e4, "factor": 4.0}}),
    "mistral": ("mistral", {"sliding_window": 64}),
    "smollm3": ("smollm3", {"num_hidden_layers": 4, "no_rope_layers": [1, 1, 1, 0]}),
    "qwen2": ("qwen2", {}),
    "qwen2 yarn": ("qwen2", {"rope_parameters": _YARN}),
    "qwen3": ("qwen3", {"tie_word_embeddings": True}),
    "phi3": ("phi3", {}),
    "olmo2": ("olmo2", {}),
    "granite": ("granite", {}),
    "gemma": ("gemma", {"tie_word_embeddings": True}),
    "gemma2": ("gemma2", _GEMMA_SIZES | {"tie_word_embeddings": True} | _CAPS),
    "gemma3": ("gemma3_text", _GEMMA_SIZES | {"num_hidden_layers": 7, "tie_word_embeddings": True}),
}


def write_run(
    folder: Path,
    family: str = "llama",
    tokenizer: PreTrainedTokenizerFast | None = None,
    rows: list[dict[str, Any]] = CHATS,
    data: dict[str, Any] | None = None,
    quantization: str = "none",
    **changes: Any,
) -> Path:
    """A base with a tokenizer, data, and an adapter on all linears."""
    tokenizer = tokenizer or byte_level_bpe()
    model = random_model(tiny_config(family, vocab_size=len(tokenizer) + 3, **changes))
    model.save_pretrained(folder / "base")
    tokenizer.save_pretrained(folder / "base")
    write_rows(folder / "rows.jsonl", rows)
    run = folder / "run"
    run.mkdir()
    sections = {"data": {"eval": 0.5} | (data or {}), "model": {"quantization": quantization}}
    values = recipe_values(folder / "base", folder / "rows.jsonl", run, **sections)
    write_recipe(run / "recipe.yaml", values)
    generator = torch.Generator().manual_seed(2)
    lora = {
        name: (
            torch.randn(4, module.in_features, generator=generator) * 0.1,
            torch.randn(module.out_features, 4, generator=generator) * 0.1,
        )
        for name, module in model.named_modules()
        if isinstance(module, torch.nn.Linear) and "layers" in name
    }
    save_adapter(run / "adapter", AdapterConfig("base", 4, 8), lora)
    return run


def log_probabilities(folder: Path, **options: Any) -> Tensor:
    """transformers' own, of the token after `TOKEN_IDS`."""
    model = AutoModelForCausalLM.from_pretrained(folder, **options).eval()
    with torch.no_grad():
        return torch.log_softmax(model(torch.tensor([TOKEN_IDS])).logits[0, -1].float(), -1)


@pytest.mark.parametrize("name", MODELS)
def test_llama_cpp_computes_the_merged_model(tmp_path: Path, name: str) -> None:
    family, changes = MODELS[name]
    run = write_run(tmp_path, family, **changes)
    folder = export(run, to="gguf", quant="f32", receipt=None)
    llama_cpp = LlamaCpp(folder / "model-f32.gguf")
    expected = log_probabilities(export(run, dtype="float32", receipt=None))
    found = llama_cpp.log_probabilities(TOKEN_IDS, len(expected))
    atol = 1e-2 if "gemma" in name else 2e-4  # llama.cpp looks GELU up in a table in half precision
    torch.testing.assert_close(found, expected, rtol=0, atol=atol)


@pytest.mark.parametrize("quant", QUANTS)
@pytest.mark.parametrize("name", ["llama", "qwen2"])
def test_every_quantization(tmp_path: Path, name: str, quant: str) -> None:
    """llama.cpp and transformers, which reads GGUF files itself, see the same model; so does the receipt."""
    family, changes = MODELS[name]
    folder = export(write_run(tmp_path, family, **changes), to="gguf", quant=quant)
    expected = log_probabilities(folder, gguf_file=f"model-{quant}.gguf", dtype=torch.float32)
    found = LlamaCpp(folder / f"model-{quant}.gguf").log_probabilities(TOKEN_IDS, len(expected))
    rounding = {"f32": 2e-4, "f16": 5e-3, "bf16": 3e-2}.get(quant, 8e-2)  # of activations, in llama.cpp
    torch.testing.assert_close(found, expected, rtol=0, atol=rounding)
    (figures,) = json.loads((folder / "receipt.json").read_text())["figures"]
    assert figures["model"] == f"merged onto original weights, {quant} (written)"
    bounds = {"f32": 1e-6, "f16": 1e-5, "bf16": 1e-4, "q8_0": 1e-3, "q5_1": 0.02, "q5_0": 0.02}
    assert figures["kl"] < bounds.get(quant, 0.05)


def test_the_receipt_shows_the_base_that_is_closer(tmp_path: Path) -> None:
    """What training saw were quantized weights: a fine format keeps them, a coarse one keeps neither base."""
    run = write_run(tmp_path, quantization="nf4", hidden_size=64, intermediate_size=128)
    said: list[str] = []
    advice = "--base dequantized would be closer to the trained model, unless it is to be loaded in 4 bits"
    for quant, base in (("q8_0", None), ("f32", "dequantized"), ("q4_0", None)):
        said.clear()
        folder = export(
            run, to="gguf", quant=quant, base=base, out=tmp_path / f"{quant} {base}", log=said.append
        )
        receipt = json.loads((folder / "receipt.json").read_text())
        written, *others = receipt["figures"]
        other = "dequantized" if base is None else "original"
        names = [f"merged onto {other} weights, before {quant} (not written)"] if quant != "q4_0" else []
        assert [one["model"] for one in others] == names
        is_advised = (quant, base) == ("q8_0", None)
        assert (receipt["remark"] == advice) == (advice in said) == is_advised
        if is_advised:
            assert others[0]["kl"] < 1e-6 < 1e-3 < written["kl"]
        elif others:
            assert written["kl"] < 1e-6 < others[0]["kl"] and receipt["remark"] is None


@pytest.mark.parametrize("kind", [*BYTE_LEVEL_CUTS, "sentencepiece", "sentencepiece without prefix"])
def test_llama_cpp_tokenises_the_same(tmp_path: Path, kind: str) -> None:
    if kind in BYTE_LEVEL_CUTS:
        tokenizer = byte_level_bpe(kind)
    else:
        tokenizer = sentencepiece_bpe(with_prefix=kind == "sentencepiece")
    run = write_run(tmp_path, tokenizer=tokenizer, num_hidden_layers=1)
    said: list[str] = []
    llama_cpp = LlamaCpp(export(run, to="gguf", receipt=None, log=said.append) / "model-f16.gguf")
    hard_text = HARD_TEXT
    if kind in ("tekken", "gpt-4o"):
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
    # What stands there without a system message does not stand beside an empty one.
    start = '{{ if and (eq $i 0) (ne .Role "system") }}<|user|>Be brief.<|end|>\n{{ end }}'
    user = '{{ if eq .Role "user" }}<|user|>{{ .Content }}<|end|>\n'
    assert f'TEMPLATE """{{{{ range $i, $_ := .Messages }}}}{start}{user}' in modelfile


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
        ("gemma2", _GEMMA_SIZES | {"query_pre_attn_scalar": 144}, "query_pre_attn_scalar 144"),
        ("gemma2", _GEMMA_SIZES | {"layer_types": ["full_attention"] * 3}, "order of layers"),
        ("gemma2", _GEMMA_SIZES | {"final_logit_softcapping": None}, "caps on these logits"),
        ("smollm3", {"no_rope_layers": [1, 0, 1]}, "no_rope_layers"),
        ("qwen2", {"rope_parameters": _YARN | {"attention_factor": 3.0}}, "attention_factor"),
        ("qwen3", {"attention_bias": True}, r"_proj\.bias"),
        ("llama", {"hidden_act": "relu"}, "activation relu"),
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
        ({"model": whole["model"] | {"ignore_merges": True}}, "cuts texts by"),
    ):
        file.write_text(json.dumps(whole | change))
        with pytest.raises(ExportError, match=message):
            export(run, to="gguf", receipt=None)
    assert sorted(path.name for path in run.iterdir()) == ["adapter", "recipe.yaml"]


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
    quantized = write.GgufTensor.quantized

    def lose_one_byte(tensor: write.GgufTensor, rows: Tensor) -> memoryview:
        data = bytearray(quantized(tensor, rows))
        if tensor.name == "blk.1.ffn_up.weight":
            data[1] ^= 0x40
        return memoryview(data)

    monkeypatch.setattr(write.GgufTensor, "quantized", lose_one_byte)
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
