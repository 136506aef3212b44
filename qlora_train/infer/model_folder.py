"""A model to generate with: a run folder (base + adapter), or any folder or hub id with config.json and
safetensors."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
from transformers import PreTrainedTokenizerBase

from qlora_train.data.prompts import answer_end_ids, encode_prompt
from qlora_train.data.tokenizer import load_tokenizer
from qlora_train.errors import RunFolderError
from qlora_train.infer.decoding import Sampling, generate_tokens
from qlora_train.memory.load import load_base
from qlora_train.memory.machine_plan import plan_here
from qlora_train.memory.packed_cache import cache_root
from qlora_train.model.adapter_files import load_adapter
from qlora_train.model.base import read_config
from qlora_train.model.decoder import FrozenDecoder
from qlora_train.model.factors import FactorBuffers
from qlora_train.model.hub import dtype_name, resolve_base, resolve_dtype
from qlora_train.model.probe import probe
from qlora_train.model.quantize import Packing
from qlora_train.recipe import DataSection, Recipe, load_recipe


@dataclass(frozen=True)
class LoadedModel:
    """decoder with its factors, if any. data: how training wrote prompts; None for a bare model."""

    decoder: FrozenDecoder
    tokenizer: PreTrainedTokenizerBase
    data: DataSection | None
    stop_ids: frozenset[int]

    def answer(self, prompts: list[str], sampling: Sampling) -> list[str]:
        """The answers to prompts written as training wrote them, all in one batch."""
        encoded = [encode_prompt(prompt, self.data, self.tokenizer) for prompt in prompts]
        answers = generate_tokens(self.decoder, encoded, sampling, self.stop_ids)
        return [str(self.tokenizer.decode(tokens, skip_special_tokens=True)) for tokens in answers]


def load_model(target: Path | str) -> LoadedModel:
    """Load what `target` names. Raises a `UserError` when it is neither a run with an adapter nor a model."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    run = Path(target)
    if (run / "recipe.yaml").is_file() and not (run / "config.json").is_file():
        return load_run(run, load_recipe(run / "recipe.yaml"), device)
    folder, _ = resolve_base(str(target), None)
    probe(read_config(folder))
    decoder = load_base(folder, _stored_packing(folder), resolve_dtype("auto", device), device)
    return _loaded(decoder, folder, None)


def load_run(run: Path, recipe: Recipe, device: torch.device, *, with_adapter: bool = True) -> LoadedModel:
    """The base of a run's recipe, packed as it was trained on, with the run's adapter or (before training)
    without. Within the recipe's memory budget, streaming what does not fit."""
    if with_adapter and not (run / "adapter").is_dir():
        raise RunFolderError(
            f"{run}: has no adapter yet; train it to the end (qlora-train train ... --resume)"
        )
    folder, _ = resolve_base(recipe.model.base, recipe.model.revision)
    dtype = resolve_dtype(recipe.model.compute_dtype, device)
    probe(read_config(folder))
    model = recipe.model.model_copy(update={"compute_dtype": dtype_name(dtype)})
    plan = plan_here(recipe.model_copy(update={"model": model}), folder, dtype, device)
    plan.require_fit()
    packing = Packing(model.quantization, model.double_quant)
    decoder = load_base(folder, packing, dtype, device, plan=plan.execution, cache=cache_root())
    if with_adapter:
        config, pairs = load_adapter(run / "adapter")
        factors = FactorBuffers(
            {name: decoder.linears[name] for name in pairs},
            rank=config.rank,
            scaling=config.scaling,
            dropout=0.0,
            seed=0,
            dtype=dtype,
            device=device,
        )
        factors.load(pairs)
    return _loaded(decoder, folder, recipe.data)


def _stored_packing(folder: Path) -> Packing:
    """How a checkpoint stores its linears: unpacked, or as bitsandbytes packed them."""
    stored = json.loads((folder / "config.json").read_text()).get("quantization_config") or {}
    if stored.get("load_in_8bit"):
        return Packing("int8")
    if stored.get("load_in_4bit"):
        form: Literal["nf4", "fp4"] = "nf4" if stored.get("bnb_4bit_quant_type") == "nf4" else "fp4"
        return Packing(form, bool(stored.get("bnb_4bit_use_double_quant")))
    return Packing("none")


def _loaded(decoder: FrozenDecoder, folder: Path, data: DataSection | None) -> LoadedModel:
    tokenizer = load_tokenizer(str(folder))
    return LoadedModel(decoder, tokenizer, data, _stop_ids(folder, tokenizer))


def _stop_ids(folder: Path, tokenizer: PreTrainedTokenizerBase) -> frozenset[int]:
    """What ends an answer by the tokenizer, its chat template and generation_config.json."""
    ids: set[int | None] = set(answer_end_ids(tokenizer))
    file = folder / "generation_config.json"
    if file.is_file():
        listed = json.loads(file.read_text()).get("eos_token_id")
        ids |= set(listed) if isinstance(listed, list) else {listed}
    return frozenset(int(token) for token in ids if token is not None)
