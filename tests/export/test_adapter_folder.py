"""`export --to adapter`: the folder as peft loads it, and what vLLM is said to refuse."""

from __future__ import annotations

import json
import shlex
from dataclasses import replace
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from adapter_runs import PLAIN, Q, V, write_run
from transformers import AutoModelForCausalLM, AutoTokenizer

from qlora_train.cli import main
from qlora_train.errors import ExportError
from qlora_train.export import export
from qlora_train.export.vllm_rules import MAX_RANKS, max_lora_rank
from qlora_train.recipe import load_recipe


def test_peft_loads_the_folder_as_the_runs_adapter(tmp_path: Path) -> None:
    run = write_run(tmp_path)
    folder = export(run, to="adapter")
    assert folder == run / "adapter-peft"
    assert {path.name for path in folder.iterdir()} == {
        "adapter_config.json", "adapter_model.safetensors", "README.md"
    }  # fmt: skip
    tokens, logits = torch.arange(3, 20)[None], []
    for adapter in (folder, run / "adapter"):
        base = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
        logits.append(peft.PeftModel.from_pretrained(base, adapter)(tokens).logits)
    plain = AutoModelForCausalLM.from_pretrained(tmp_path / "base")(tokens).logits
    assert torch.equal(*logits) and not torch.equal(logits[0], plain)
    written = b"".join(path.read_bytes() for path in folder.iterdir())
    assert str(tmp_path).encode() not in written and b"secret" not in written
    card = (folder / "README.md").read_text()
    assert "library_name: peft" in card and "vLLM" not in card
    with pytest.raises(ExportError, match="not an empty folder"):
        export(run, to="adapter")


def test_the_command_for_vllm_is_printed_and_in_the_card(tmp_path: Path, capfd: Any) -> None:
    template = tmp_path / "mine.jinja"
    template.write_text("{% for m in messages %}<{{ m.content }}>{{ eos_token }}{% endfor %}")
    config = replace(PLAIN, rank=20, alpha=40, rank_pattern={V: 33}, alpha_pattern={V: 66})
    run = write_run(tmp_path, config, chat_template=str(template))
    assert main(["export", str(run), "--to", "adapter", "--for", "vllm"]) == 0
    folder = run / "adapter-vllm"
    (line,) = [text for text in capfd.readouterr().out.splitlines() if text.startswith("vLLM (not run")]
    words = shlex.split(line.removeprefix("vLLM (not run: no vLLM here): "))
    assert words[:3] == ["vllm", "serve", str(tmp_path / "base")]
    options = dict(zip(words[4::2], words[5::2], strict=True))
    assert words[3] == "--enable-lora"
    assert options == {
        "--max-lora-rank": "64",
        "--lora-modules": f"adapter-vllm={folder}",
        "--chat-template": f"{folder}/chat_template.jinja",
    }
    assert (folder / "chat_template.jinja").read_text() == template.read_text()
    card = (folder / "README.md").read_text()
    assert "not run: no vLLM here" in card and "vllm serve base --enable-lora --max-lora-rank 64" in card
    assert str(tmp_path) not in card


def test_what_vllm_computes_otherwise_is_said(tmp_path: Path) -> None:
    """The original weights, where the base has them; the command has the template's settings."""
    said: list[str] = []
    run = write_run(tmp_path)
    recipe = run / "recipe.yaml"
    weights = "vLLM computes with the original weights, and training did with nf4: what that changes, "
    export(run, to="adapter", loaders=["vllm"], log=said.append)
    assert any(line.startswith(weights) for line in said)
    assert not any("template_kwargs" in line for line in said)
    changed = load_recipe(recipe, ["data.chat_template_kwargs={enable: false}"])
    recipe.write_text(changed.to_yaml(), encoding="utf-8")
    card = (export(run, to="adapter", loaders=["vllm"], out=tmp_path / "out") / "README.md").read_text()
    assert "--default-chat-template-kwargs '{\"enable\": false}'" in card and weights in card
    config = tmp_path / "base" / "config.json"
    quantized = {"quant_method": "bitsandbytes", "load_in_4bit": True, "bnb_4bit_quant_type": "nf4"}
    config.write_text(json.dumps(json.loads(config.read_text()) | {"quantization_config": quantized}))
    folder = export(run, to="adapter", loaders=["vllm"], out=tmp_path / "quantized")
    assert "original weights" not in (folder / "README.md").read_text()
    with pytest.raises(ExportError, match="no --base, --dtype, --receipt or --quant"):
        export(run, to="adapter", receipt=77)


def test_new_tokens_come_with_their_tokenizer(tmp_path: Path) -> None:
    run = write_run(tmp_path, add_tokens=["<new>"])
    folder = export(run, to="adapter")
    assert len(AutoTokenizer.from_pretrained(folder)("<new>", add_special_tokens=False)["input_ids"]) == 1
    written = b"".join(path.read_bytes() for path in folder.iterdir())
    assert str(tmp_path).encode() not in written


@pytest.mark.parametrize(
    "change,paths,message",
    [
        ({"use_dora": True}, [Q], "DoRA"),
        ({"lora_bias": True}, [Q], "lora.lora_bias"),
        ({"token_ids": (7,)}, [Q], "1 tokens: model.add_tokens"),
        ({"target_parameters": ["mlp.experts.down_proj"]}, [Q, "model.layers.0.mlp.experts.down_proj"],
         "experts in other layouts"),
        ({}, [Q, "lm_head"], "lm_head"),
        ({}, [Q, "model.layers.0.linear_attn.in_proj_qkvz"], "in_proj_qkvz"),
        ({"rank": 513}, [Q], "highest rank is 512, and r is 513"),
        ({"rank_pattern": {V: 513}}, [Q, V], f"highest rank is 512, and {V} has 513"),
        ({"rank_pattern": {V: 8}}, [Q, V], f"scales all modules by 2, and {V} is trained with 1"),
        ({"alpha_pattern": {V: 16.0}}, [Q, V], "trained with 4"),
    ],
)  # fmt: skip
def test_what_vllm_does_not_serve_as_trained_is_refused(
    change: dict[str, Any], paths: list[str], message: str
) -> None:
    with pytest.raises(ExportError, match="--to merged") as refused:
        max_lora_rank(replace(PLAIN, **change), paths, ["LlamaForCausalLM"])
    assert message in str(refused.value)


def test_an_architecture_without_lora_is_refused() -> None:
    with pytest.raises(ExportError, match="no LoRA for OlmoeForCausalLM"):
        max_lora_rank(PLAIN, [Q], ["OlmoeForCausalLM"])


@pytest.mark.parametrize("rank,flag", [(1, 1), (2, 8), (16, 16), (17, 32), (257, 320), (512, 512)])
def test_the_rank_is_rounded_up_to_one_that_vllm_takes(rank: int, flag: int) -> None:
    assert flag in MAX_RANKS and max_lora_rank(replace(PLAIN, rank=rank), [Q], []) == flag


def test_the_rank_of_the_config_counts_even_where_no_module_has_it() -> None:
    config = replace(PLAIN, rank=64, alpha=128, rank_pattern={Q: 8}, alpha_pattern={Q: 16})
    assert max_lora_rank(config, [Q], []) == 64


def test_rslora_is_one_scaling_unless_ranks_differ() -> None:
    config = replace(PLAIN, use_rslora=True)
    assert max_lora_rank(config, [Q, V], []) == 8
    with pytest.raises(ExportError, match="scales all modules"):
        max_lora_rank(replace(config, rank_pattern={V: 16}), [Q, V], [])


def test_a_refused_adapter_leaves_no_folder(tmp_path: Path) -> None:
    run = write_run(tmp_path, replace(PLAIN, use_dora=True))
    with pytest.raises(ExportError, match="refuses DoRA"):
        export(run, to="adapter", loaders=["vllm"])
    assert not (run / "adapter-vllm").exists()
    assert export(run, to="adapter").is_dir()  # peft loads DoRA


@pytest.mark.parametrize(
    "options",
    [
        {"to": "merged", "loaders": ["vllm"]},
        {"to": "gguf", "loaders": ["vllm"]},
        {"to": "adapter", "loaders": ["transformers"]},
        {"to": "adapter", "base": "original"},
        {"to": "adapter", "dtype": "float16"},
        {"to": "adapter", "quant": "q8_0"},
    ],
)
def test_options_of_another_export_are_refused(tmp_path: Path, options: dict[str, Any]) -> None:
    with pytest.raises(ExportError, match="--to adapter"):
        export(tmp_path, **options)
