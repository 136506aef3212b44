"""The receipt against plain torch, its table of both bases, the choice of dtype, and what it refuses."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_models import random_model, tiny_config
from tiny_runs import byte_tokenizer, recipe_values, reversal_rows, write_recipe, write_rows
from transformers import AutoModelForCausalLM

from qlora_train.adapter.adapter_config import AdapterConfig
from qlora_train.adapter.adapter_files import save_adapter
from qlora_train.adapter.trained_on import TrainedOn
from qlora_train.device.compute import THE_CPU
from qlora_train.errors import BaseModelError, ExportError
from qlora_train.export import export, measure, walked_model
from qlora_train.export.receipt import compare
from qlora_train.export.walked_model import HeldOut, walk_model
from qlora_train.generate.model_folder import find_model
from qlora_train.quant.formats import Quantization
from qlora_train.recipe import load_recipe

UNQUANTIZED = Quantization("none")


def write_run(
    folder: Path,
    family: str = "llama-tied",
    scale: float = 0.02,
    dtype: torch.dtype = torch.float32,
    use_dora: bool = False,
) -> Path:
    """A base, data, and an adapter as small as one epoch of training makes it."""
    sizes = {"hidden_size": 128, "intermediate_size": 256}  # as bitsandbytes' kernel for CPUs wants them
    model = random_model(tiny_config(family, vocab_size=259, **sizes)).to(dtype)
    model.save_pretrained(folder / "base")
    byte_tokenizer().save_pretrained(folder / "base")
    rows = write_rows(folder / "rows.jsonl", reversal_rows(40))
    run = folder / "run"
    run.mkdir()
    values = recipe_values(folder / "base", rows, run, data={"eval": 0.5}, model={"compute_dtype": "float32"})
    write_recipe(run / "recipe.yaml", values)
    generator = torch.Generator().manual_seed(2)
    lora = {
        name: (
            torch.randn(4, module.in_features, generator=generator) * scale,
            torch.randn(module.out_features, 4, generator=generator) * scale,
            *([module.weight.detach().norm(dim=1) * 1.2] if use_dora else []),
        )
        for name, module in model.named_modules()
        if isinstance(module, torch.nn.Linear) and "layers" in name
    }
    recipe = load_recipe(run / "recipe.yaml")
    trained_on = TrainedOn.of(recipe.model, folder / "base", run, byte_tokenizer())
    said = {"trained_on.json": trained_on.to_json(3, 3)}
    save_adapter(run / "adapter", AdapterConfig("base", 4, 8, use_dora=use_dora), lora, said)
    return run


def some_documents(lengths: tuple[int, ...] = (9, 17, 5)) -> HeldOut:
    rng = np.random.default_rng(0)
    ids = [rng.integers(3, 90, n) for n in lengths]
    places = [np.arange(2, n - 1) for n in lengths]
    return HeldOut(ids, places, [i[p + 1] for i, p in zip(ids, places, strict=True)], "made up")


def figures_of(folder: Path) -> dict[str, dict[str, Any]]:
    return {row["model"].strip(): row for row in json.loads((folder / "receipt.json").read_text())["figures"]}


@pytest.mark.parametrize("family", ["llama", "llama-tied", "granite", "gemma2", "cohere"])
def test_figures_are_those_of_whole_logits(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, family: str
) -> None:
    """With tiles smaller than the vocabulary; logit scales and caps are the family's."""
    monkeypatch.setattr(walked_model, "HEAD_TILE_ROWS", 40)
    documents, logits, walked = some_documents(), [], []
    for seed in (0, 1):
        folder = tmp_path / str(seed)
        model = random_model(tiny_config(family), seed)
        if seed:  # near the other one
            other = random_model(tiny_config(family), 0)
            for mine, theirs in zip(model.parameters(), other.parameters(), strict=True):
                mine.data = theirs.data + 0.05 * mine.data
        model.save_pretrained(folder)
        with torch.no_grad():
            parts = [model(torch.from_numpy(ids)[None]).logits[0] for ids in documents.token_ids]
        logits.append(torch.cat([part[p] for part, p in zip(parts, documents.places, strict=True)]))
        walked.append(walk_model(folder, documents, UNQUANTIZED, torch.float32, THE_CPU))
    loss, found = compare(walked[0], walked[1], documents, "other")
    p, q = (torch.log_softmax(part.double(), -1) for part in logits)
    labels = torch.from_numpy(documents.all_labels)[:, None]
    assert loss == pytest.approx(float(-p.gather(1, labels).mean()), rel=1e-4)
    assert found.loss == pytest.approx(float(-q.gather(1, labels).mean()), rel=1e-4)
    assert found.kl == pytest.approx(float((p.exp() * (p - q)).sum(-1).mean()), rel=1e-3, abs=3e-7)
    assert found.top1 == pytest.approx(float((p.argmax(-1) == q.argmax(-1)).double().mean()))
    assert compare(walked[0], walked[0], documents, "itself")[1].kl < 1e-6


def test_the_default_survives_quantizing_and_the_other_base_does_not(tmp_path: Path) -> None:
    """An adapter that is small beside the quantization's steps, through real loaders too."""
    run = write_run(tmp_path)
    said: list[str] = []
    folder = export(run, loaders=["transformers", "bnb-4bit"], log=said.append)
    found = figures_of(folder)
    written = found["merged onto original weights, float16 (written)"]
    assert found["the same, loaded by transformers"]["kl"] == pytest.approx(written["kl"], rel=0.02, abs=1e-6)
    walked = [row for name, row in found.items() if name.startswith("the same, quantized")]
    loaded = found["the same, loaded by transformers + bitsandbytes in 4 bits"]
    assert walked and loaded["loss"] > 0
    other = found["merged onto dequantized weights, float16 (not written)"]
    assert other["kl"] < 1e-5 < written["kl"]
    assert any(line.startswith("receipt on ") for line in said)
    config = json.loads((folder / "config.json").read_text())
    assert config["qlora_train"] == {"merged_onto": "original"} and config["dtype"] == "float16"


@pytest.mark.parametrize("use_dora", [False, True], ids=["LoRA", "DoRA"])
def test_the_receipt_of_the_dequantized_base(tmp_path: Path, use_dora: bool) -> None:
    folder = export(write_run(tmp_path, use_dora=use_dora), base="dequantized", dtype="float32")
    found = figures_of(folder)
    assert found["merged onto dequantized weights, float32 (written)"]["kl"] < 1e-6
    assert "merged onto original weights, float32 (not written)" in found
    with pytest.raises(BaseModelError, match="--base original"):
        recipe = json.loads((tmp_path / "run" / "recipe.yaml").read_text())
        recipe["model"]["base"] = str(folder)
        other = tmp_path / "other"
        (other / "adapter").mkdir(parents=True)
        write_recipe(other / "recipe.yaml", recipe)
        find_model(other)


def test_no_receipt(tmp_path: Path) -> None:
    run = write_run(tmp_path)
    folder = export(run, receipt=None)
    assert not (folder / "receipt.json").exists()
    with pytest.raises(ExportError, match="needs a receipt"):
        export(run, receipt=None, loaders=["bnb-4bit"], out=tmp_path / "x")


def test_values_beyond_fp16_choose_the_bases_dtype(tmp_path: Path) -> None:
    run = write_run(tmp_path, "gemma3_text", dtype=torch.bfloat16)
    weights = tmp_path / "base" / "model.safetensors"
    tensors = load_file(weights)
    large = {n: torch.full_like(t, 3e4) for n, t in tensors.items() if "post_feedforward_layernorm" in n}
    assert large
    save_file(tensors | large, weights, metadata={"format": "pt"})
    (run / "adapter" / "trained_on.json").unlink()  # it was another base
    said: list[str] = []
    folder = export(run, log=said.append)
    assert json.loads((folder / "config.json").read_text())["dtype"] == "bfloat16"
    assert any(line.startswith("written in bfloat16, not float16: layer") for line in said)
    logits = AutoModelForCausalLM.from_pretrained(folder)(torch.tensor([[1, 5, 9]])).logits
    assert torch.isfinite(logits).all()
    with pytest.raises(
        ExportError, match=r"--dtype float16: layer \d.* reaches .*Export with --dtype bfloat16"
    ):
        export(run, dtype="float16", out=tmp_path / "half")
    assert not (tmp_path / "half").exists()


def test_a_check_that_fails_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = write_run(tmp_path)

    def broken(*arguments: Any, **options: Any) -> None:
        raise ExportError("not finite")

    monkeypatch.setattr(measure, "compare", broken)
    with pytest.raises(ExportError, match="not finite"):
        export(run)
    assert sorted(path.name for path in run.iterdir()) == ["adapter", "recipe.yaml"]


def test_another_base_or_template_is_refused_and_a_moved_base_is_found(tmp_path: Path) -> None:
    run = write_run(tmp_path)
    moved = tmp_path / "away"
    moved.mkdir()
    (tmp_path / "base").rename(moved / "base")
    run = run.rename(moved / "run")  # the whole project was moved
    assert find_model(run).folder == (moved / "base")
    template = moved / "base" / "chat_template.jinja"
    before = template.read_text()
    template.write_text(before + " ")
    with pytest.raises(BaseModelError, match="another chat template"):
        find_model(run)
    template.write_text(before)
    tensors = load_file(moved / "base" / "model.safetensors")
    save_file({n: t + 0.01 for n, t in tensors.items()}, moved / "base" / "model.safetensors")
    for use in (lambda: find_model(run), lambda: export(run)):
        with pytest.raises(BaseModelError, match="is not the base that"):
            use()
    (moved / "base").rename(tmp_path / "gone")
    with pytest.raises(BaseModelError, match=r"recipe\.yaml \(model\.base\)"):
        find_model(run)
