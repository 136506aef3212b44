"""A run with added tokens, from the recipe to PEFT, generation and merged weights in plain transformers."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from llama_cpp_server import LlamaCpp
from peft import PeftModel
from tiny_runs import (
    adapter_bytes,
    adapter_tensors,
    byte_tokenizer,
    recipe_values,
    reversal_rows,
    write_base,
    write_recipe,
    write_rows,
)
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer

from qlora_train.cli import main
from qlora_train.errors import BaseModelError
from qlora_train.export import export
from qlora_train.export.receipt import RECEIPT_FILE
from qlora_train.generate.decoding import generate_tokens
from qlora_train.generate.model_folder import find_model
from qlora_train.generate.sampling import Sampling
from qlora_train.plan.planned_walk import GenerateSize
from qlora_train.recipe import load_recipe
from qlora_train.train import train

TOKENS = [
    {"token": "<|im_start|>", "special": True},
    {"token": "<|im_end|>", "special": True},
    "<tool>",
    "a",
]
NEW_IDS = [259, 260, 261]  # behind the 259 of the byte tokenizer
BASES: dict[str, dict[str, Any]] = {
    "untied": {"vocab_size": 259},
    "tied, one row unused": {"vocab_size": 260, "tie_word_embeddings": True},
    "rows unused": {"vocab_size": 264},
}


@pytest.fixture
def data(tmp_path: Path) -> Path:
    rows = (
        {"messages": [{"role": "user", "content": row["prompt"]}, {"role": "assistant", "content": "<tool>"}]}
        for row in reversal_rows(12)
    )
    return write_rows(tmp_path / "train.jsonl", rows)


def recipe_of(base: Path, data: Path, folder: Path) -> Path:
    values = recipe_values(
        base,
        data,
        folder / "run",
        model={"quantization": "none", "chat_template": "chatml", "add_tokens": TOKENS},
        data={"sequence_length": 64, "eval": 0.3},
        training={"max_steps": 4, "learning_rate": 2e-2},
    )
    return write_recipe(folder / "recipe.yaml", values)


def logits_of(model: Any, ids: list[int]) -> Tensor:
    with torch.no_grad():
        found: Tensor = model(input_ids=torch.tensor([ids])).logits[0]
    return found


@pytest.mark.parametrize("name", BASES)
def test_peft_and_plain_transformers_load_what_was_trained(
    tmp_path: Path, data: Path, name: str, capsys: pytest.CaptureFixture[str]
) -> None:
    changes = BASES[name]
    base = write_base(tmp_path / "base", **changes)
    recipe = recipe_of(base, data, tmp_path)
    assert main(["plan", str(recipe)]) == 0
    assert main(["preview", str(recipe)]) == 0
    known = "model.add_tokens: a is in the vocabulary already: its row is trained from what it is"
    assert known in capsys.readouterr().out.splitlines()
    assert main(["train", str(recipe)]) == 0
    said = capsys.readouterr().out
    assert known in said and "rows of 4 tokens" in said
    run = tmp_path / "run"

    source = find_model(run)
    prompt = source.encode("abcd:")
    assert set(NEW_IDS[:2]) < set(prompt), "the template's tokens are one token each"
    loaded = source.load(GenerateSize((len(prompt),), 8))
    (answer,) = generate_tokens(loaded.decoder, [prompt], Sampling(8, temperature=0.0), frozenset())

    source.attach(loaded.decoder, None)
    (of_base,) = generate_tokens(loaded.decoder, [prompt], Sampling(8), frozenset())
    source.attach(loaded.decoder, run / "adapter")
    (again,) = generate_tokens(loaded.decoder, [prompt], Sampling(8), frozenset())
    assert of_base != answer == again, "the base reads the tokens too, with rows as they were at first"

    plain = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    rows_before = plain.get_input_embeddings().weight.detach().clone()
    num_rows = max(changes["vocab_size"], 262)
    if num_rows > changes["vocab_size"]:
        plain.resize_token_embeddings(num_rows, mean_resizing=False)
    wrapped = PeftModel.from_pretrained(plain, run / "adapter").eval()
    export(run, dtype="float32", loaders=["transformers"])
    merged = AutoModelForCausalLM.from_pretrained(run / "merged", dtype=torch.float32).eval()
    assert merged.config.vocab_size == num_rows == merged.get_input_embeddings().weight.shape[0]
    assert merged.config.tie_word_embeddings == changes.get("tie_word_embeddings", False)
    every = [*prompt, *answer, *NEW_IDS]
    torch.testing.assert_close(logits_of(merged, every), logits_of(wrapped, every), rtol=1e-5, atol=1e-5)
    greedy = merged.generate(torch.tensor([prompt]), max_new_tokens=8, do_sample=False, eos_token_id=None)
    assert greedy[0, len(prompt) :].tolist() == answer

    gguf = export(run, to="gguf", quant="f32")
    llama_cpp = LlamaCpp(gguf / "model-f32.gguf")
    text = "<|im_start|>user\nab<tool>c<|im_end|>"
    assert llama_cpp.token_ids(text) == AutoTokenizer.from_pretrained(run / "merged")(text).input_ids
    found = llama_cpp.log_probabilities(every, num_rows)
    torch.testing.assert_close(found, torch.log_softmax(logits_of(merged, every)[-1], -1), rtol=0, atol=2e-4)
    (figures,) = json.loads((gguf / RECEIPT_FILE).read_text())["figures"]
    assert abs(figures["loss_difference"]) < 1e-4
    tokenizer = AutoTokenizer.from_pretrained(run / "merged")
    assert tokenizer("<tool><|im_end|>", add_special_tokens=False).input_ids == [261, 260]
    assert tokenizer.decode([261, 260], skip_special_tokens=True) == "<tool>"
    assert "<|im_start|>" in tokenizer.chat_template
    rows = merged.get_input_embeddings().weight.detach()
    (known_id,) = byte_tokenizer()("a", add_special_tokens=False).input_ids
    changed = (rows[:259] != rows_before[:259]).any(1).nonzero().flatten().tolist()
    assert changed == [known_id], "no other row of the base is changed"

    receipt = json.loads((run / "merged" / RECEIPT_FILE).read_text())
    for figures in receipt["figures"]:
        if "nf4" not in figures["model"] and "4 bits" not in figures["model"]:
            assert abs(figures["loss_difference"]) < 1e-4, figures


def test_streamed_is_resident_and_continued(tmp_path: Path, data: Path) -> None:
    """The same adapter from the disk; another run goes on from it, and refuses other tokens."""
    base = write_base(tmp_path / "base")
    adapters = []
    for name, places in (("resident", "auto"), ("disk", "disk")):
        (tmp_path / name).mkdir()
        train(load_recipe(recipe_of(base, data, tmp_path / name), [f"memory.weights={places}"]))
        adapters.append(adapter_bytes(tmp_path / name / "run"))
    assert adapters[0] == adapters[1]
    start = f"lora.init_from={tmp_path / 'resident' / 'run' / 'adapter'}"
    again = [start, f"training.output_dir={tmp_path / 'again'}", "training.learning_rate=1e-30"]
    train(load_recipe(tmp_path / "resident" / "recipe.yaml", again))
    first, second = (adapter_tensors(run) for run in (tmp_path / "resident" / "run", tmp_path / "again"))
    assert first.keys() == second.keys() and all(torch.equal(first[key], second[key]) for key in first)
    with pytest.raises(BaseModelError, match="has trained rows of the tokens"):
        others = "model.add_tokens=['<|im_start|>', '<|im_end|>']"
        train(load_recipe(tmp_path / "resident" / "recipe.yaml", [start, f"{again[1]}-not", others]))
