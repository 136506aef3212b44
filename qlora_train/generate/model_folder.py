"""Finds and loads a model to generate with: a run folder (base + adapter), or a model's folder or hub id.

`find_model` reads only configs and the tokenizer, so that prompts can be encoded; `ModelSource.load` makes a
plan for their lengths (plan/generation.py) and loads the weights as planned.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from transformers import PreTrainedTokenizerBase

from qlora_train.adapter.adapter_config import HEAD
from qlora_train.adapter.adapter_files import load_fitting
from qlora_train.adapter.pissa import as_adapter, as_trained
from qlora_train.adapter.run_adapter import find_adapter
from qlora_train.adapter.trained_on import find_base, read_trained_on
from qlora_train.data.added_tokens import AddedTokens
from qlora_train.data.prompts import (
    encode_messages,
    encode_prompt,
    encode_raw,
    how_to_chat,
    is_chat,
    stop_token_ids,
)
from qlora_train.data.tokenizer import load_tokenizer, read_stop_ids, tokenizer_of_run
from qlora_train.device.compute import ComputeDevice
from qlora_train.device.compute_dtype import dtype_name, resolve_dtype
from qlora_train.device.settings import apply_settings
from qlora_train.errors import DataError, RunFolderError, UserError
from qlora_train.files.hub import resolve_base
from qlora_train.generate.decoding import generate_tokens
from qlora_train.generate.sampling import Sampling
from qlora_train.kernels.on_device import find_device
from qlora_train.model.adapted_head import AdaptedHead
from qlora_train.model.base import read_config
from qlora_train.model.base_folder import check_base, read_plain_config, stored_quantization
from qlora_train.model.decoder import FrozenDecoder
from qlora_train.model.linear import DropoutContext
from qlora_train.model.lora_parameters import LoraParameters
from qlora_train.model.probe import ProbeResult
from qlora_train.model.token_rows import TokenRows, initial_rows
from qlora_train.plan.generation import GenerationPlan
from qlora_train.plan.machine_plan import enforce_budget, plan_generation_here
from qlora_train.plan.model_shape import find_shape, shape_of
from qlora_train.plan.planned_walk import GenerateSize
from qlora_train.plan.unpinned import host_memory_of_generation
from qlora_train.plan.workload import Workload, workload_of
from qlora_train.quant.formats import Quantization
from qlora_train.recipe import DataSection, LoraSection, MemorySection, Recipe, load_recipe
from qlora_train.weights.cache_key import cache_root, residual_key
from qlora_train.weights.load import load_base


@dataclass(frozen=True)
class LoadedModel:
    """A loaded model. decoder: with LoRA parameters, if any. data: the run's data section, which says how
    prompts are written; None for a model without a run. plan: the plan it was loaded by."""

    decoder: FrozenDecoder
    tokenizer: PreTrainedTokenizerBase
    data: DataSection | None
    stop_ids: frozenset[int]
    plan: GenerationPlan

    def answers(
        self,
        prompts: Sequence[Sequence[int]],
        sampling: Sampling,
        batch_size: int,
        is_complete: Callable[[Sequence[int]], bool] | None = None,
    ) -> Iterator[str]:
        """The answers to encoded prompts, of which batch_size run together: no answer depends on it.
        is_complete: see `generate_tokens`."""
        for start in range(0, len(prompts), batch_size):
            batch = range(start, min(start + batch_size, len(prompts)))
            chosen = [prompts[i] for i in batch]
            for tokens in generate_tokens(
                self.decoder, chosen, sampling, self.stop_ids, numbers=batch, is_complete=is_complete
            ):
                yield str(self.tokenizer.decode(tokens, skip_special_tokens=True))


@dataclass(frozen=True)
class ModelSource:
    """A model whose weights are not loaded. folder: of the base. probed: result of the start-up probe.
    recipe: of the run, its compute dtype resolved; None for a model without a run. adapter: its folder, if
    any. other_recipes: of runs whose adapters may be attached later. added: the run's `model.add_tokens`."""

    folder: Path
    probed: ProbeResult
    quantization: Quantization
    dtype: torch.dtype
    device: ComputeDevice
    tokenizer: PreTrainedTokenizerBase
    recipe: Recipe | None = None
    adapter: Path | None = None
    other_recipes: tuple[Recipe, ...] = ()
    added: AddedTokens = AddedTokens()

    @property
    def data(self) -> DataSection | None:
        return None if self.recipe is None else self.recipe.data

    def encode(self, prompt: str, *, system: str | None = None, raw: bool = False) -> list[int]:
        """Token ids of a prompt written as in training, after a system message; raw: as it is."""
        if raw:
            return encode_raw(prompt, self.tokenizer)
        return encode_prompt(prompt, self.data, self.tokenizer, system=system)

    def encode_messages(self, messages: Sequence[Mapping[str, str]]) -> list[int]:
        """Token ids of a conversation that is to be continued, written as in training. Raises `DataError`
        where the model's prompts are no conversations."""
        if not is_chat(self.data, self.tokenizer):
            raise DataError(
                "The model's prompts are plain text, no conversations: use generate --prompt"
                f"{how_to_chat(self.data, self.tokenizer)}."
            )
        return encode_messages(messages, self.data, self.tokenizer)

    def load(
        self,
        size: GenerateSize,
        *,
        vram_bytes: int | None = None,
        log: Callable[[str], None] = lambda line: None,
    ) -> LoadedModel:
        """Load the model for batches of this size, within vram_bytes (None: the recipe's budget, or what is
        free), streaming weights that do not fit. log: called with lines about what takes time or streams.
        Raises `UserError` where nothing fits."""
        memory = MemorySection() if self.recipe is None else self.recipe.memory
        budget_bytes = memory.vram_bytes if vram_bytes is None else vram_bytes
        plan = plan_generation_here(
            self._workload(),
            size,
            self.device,
            vram_bytes=budget_bytes,
            weights=memory.weights,
        )
        plan.require_fit()
        enforce_budget(self.device, plan.workload, budget_bytes)
        if not plan.execution.is_resident:
            log(plan.line())
        decoder = load_base(
            self.folder,
            self.quantization,
            self.dtype,
            self.device,
            plan=plan.execution,
            cache=None if self.recipe is None and plan.execution.is_resident else cache_root(),
            host=host_memory_of_generation(plan, self.device, log),
            log=log,
            lora=self._lora,
        )
        if self.recipe is None or self.recipe.training.kernels == "auto":
            decoder.fuse(
                norms=self.probed.fuses_norms, mlps=self.probed.fuses_mlps, qkv=self.probed.fuses_qkv
            )
        self.attach(decoder, self.adapter)
        decoder.tile_mlps(plan.execution.mlp_tile_tokens, DropoutContext())
        self.device.release_cached()  # what loading took would stay beside other sizes
        return LoadedModel(decoder, self.tokenizer, self.data, self.stop_ids(), plan)

    def stop_ids(self) -> frozenset[int]:
        """The tokens that end an answer."""
        return frozenset(stop_token_ids(self.tokenizer, read_stop_ids(str(self.folder)), self.data))

    def with_adapters(
        self, runs: Mapping[str, Path], log: Callable[[str], None]
    ) -> tuple[ModelSource, dict[str, Path]]:
        """(this source, with room in its plan for the largest adapter, {name: adapter folder}). runs: of
        other adapters, by name. Raises a `UserError` for one that was trained on another base."""
        folders = {} if self.adapter is None else {"trained": self.adapter}
        recipes = [] if self.recipe is None else [self.recipe]
        for name, run in runs.items():
            folders[name] = find_adapter(run, None, log)
            if (trained_on := read_trained_on(folders[name])) is not None:
                trained_on.check_base(self.folder, folders[name])
                trained_on.check_tokenizer(self.tokenizer, folders[name])
            recipes.append(load_recipe(run / "recipe.yaml"))
            if residual_key(recipes[-1].lora) != residual_key(self._lora):
                raise RunFolderError(
                    f"{run}: of this adapter and the one beside it, one was trained with PiSSA "
                    "(lora.init_lora_weights), so their bases differ. Run them apart, or export them."
                )
        return replace(self, other_recipes=tuple(recipes)), folders

    def attach(self, decoder: FrozenDecoder, adapter: Path | None) -> None:
        """Put an adapter's LoRA parameters in the place of those that there are; None: the base alone, which
        after PiSSA is the residual with the principal parts."""
        for adaptable in decoder.adaptable.values():
            adaptable.lora = None
        if isinstance(decoder.head, AdaptedHead | TokenRows):
            decoder.head = decoder.head.stored
        if isinstance(decoder.embedding, TokenRows):
            decoder.embedding = decoder.embedding.stored
        device, factors = self.device.torch, decoder.principal_factors
        if adapter is None and self.added.ids:
            matrices = zip(decoder.matrix_paths, (decoder.embedding, decoder.head), strict=False)
            first = {path: initial_rows(stored, self.added.parts, device) for path, stored in matrices}
            rows = {path: rows.to(self.dtype) for path, rows in first.items()}
            decoder.set_token_rows(self.added.ids, rows)
        if adapter is not None:
            existing = [*decoder.adaptable, *decoder.matrix_paths, HEAD]
            config, pairs = as_trained(self._lora, load_fitting(adapter, existing))
        elif factors:
            config, pairs = as_adapter(factors)
        else:
            return
        if len(pairs.get(HEAD, ())) > 1:
            decoder.adapt_head(pairs.pop(HEAD), config.scaling_of(HEAD))
        lora = LoraParameters.of_adapter(decoder.adaptable, config, pairs, dtype=self.dtype, device=device)
        if config.token_ids:
            decoder.set_token_rows(config.token_ids, lora.token_rows(lora.working))

    @property
    def _lora(self) -> LoraSection | None:
        """Of the adapter's run; None: there is no adapter."""
        return self.recipe.lora if self.recipe is not None and self.adapter is not None else None

    def _workload(self) -> Workload:
        shape, target = find_shape(str(self.folder)), self.device.description
        recipes = [] if self.recipe is None or self.adapter is None else [self.recipe]
        with_lora = [workload_of(recipe, shape, target) for recipe in (*recipes, *self.other_recipes)]
        if with_lora:
            largest = max(with_lora, key=lambda workload: workload.num_lora_parameters)
            return replace(largest, quantization=self.quantization, dtype=self.dtype)
        return Workload(shape, self.quantization, self.dtype, target)


def find_model(
    target: Path | str, *, checkpoint: str | None = None, log: Callable[[str], None] = lambda line: None
) -> ModelSource:
    """The model that `target` names. checkpoint: of a run, see `find_adapter`. Raises a `UserError` where it
    is neither a run with an adapter nor a model."""
    apply_settings()
    device = find_device()
    run = Path(target)
    if (run / "recipe.yaml").is_file() and not (run / "config.json").is_file():
        adapter = find_adapter(run, checkpoint, log)
        return find_run(run, load_recipe(run / "recipe.yaml"), device, adapter)
    if checkpoint is not None:
        raise RunFolderError(f"{target}: --checkpoint names one of a run, and this is no run folder")
    folder, _ = resolve_base(str(target), None)
    check_base(folder)
    probed = shape_of(read_config(folder)).probed
    dtype = resolve_dtype("auto", device.description)
    return ModelSource(
        folder,
        probed,
        stored_quantization(read_plain_config(folder).get("quantization_config") or {}),
        dtype,
        device,
        load_tokenizer(str(folder)),
    )


def refuse_base_alone(source: ModelSource, with_base: bool) -> None:
    """Raise `UserError` where a model's base is asked for beside it, and it has none."""
    if with_base and source.adapter is None:
        raise UserError("--base compares a run with its base, and this is a model without an adapter")


def find_run(run: Path, recipe: Recipe, device: ComputeDevice, adapter: Path | None) -> ModelSource:
    """The base of a run, quantized as in training. adapter: of the run; None: without one, before training.
    Raises `BaseModelError` if base, tokenizer or template differ from those of training."""
    folder, _ = find_base(recipe.model, run)
    check_base(folder, recipe.model.quantization)
    tokenizer, added = tokenizer_of_run(recipe.model, str(folder))
    if adapter is not None and (trained_on := read_trained_on(adapter)) is not None:
        trained_on.check_base(folder, adapter)
        trained_on.check_tokenizer(tokenizer, adapter)
    dtype = resolve_dtype(recipe.model.compute_dtype, device.description)
    probed = shape_of(read_config(folder)).probed
    model = recipe.model.model_copy(update={"compute_dtype": dtype_name(dtype)})
    return ModelSource(
        folder,
        probed,
        Quantization(model.quantization, model.double_quant),
        dtype,
        device,
        tokenizer,
        recipe.model_copy(update={"model": model}),
        adapter,
        added=added,
    )
