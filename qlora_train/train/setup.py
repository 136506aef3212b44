"""Prepares a run before its folder is touched: device, data, base, LoRA parameters. Bad input is refused
here."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from accelerate import Accelerator
from transformers import PreTrainedTokenizerBase

from qlora_train.adapter.adapter_config import HEAD, AdapterConfig, name_parameters, name_targets
from qlora_train.adapter.adapter_files import LoraPairs, head_copy, load_fitting, save_adapter
from qlora_train.adapter.continued_adapter import as_continued
from qlora_train.adapter.lora_targets import LoraTarget, choose_targets
from qlora_train.adapter.pissa import Factors, as_plain_lora, initial_values, is_pissa
from qlora_train.adapter.trained_on import TrainedOn, find_base, read_trained_on
from qlora_train.data.added_tokens import AddedTokens
from qlora_train.data.building import OpenData, build_dataset
from qlora_train.data.dataset import PackedDataset
from qlora_train.data.tokenizer import read_stop_ids, tokenizer_of_run
from qlora_train.device.compute import ComputeDevice
from qlora_train.device.compute_dtype import dtype_name, resolve_dtype
from qlora_train.device.description import DeviceDescription
from qlora_train.device.settings import apply_settings, make_deterministic
from qlora_train.errors import BaseModelError, UserError
from qlora_train.model.base import adaptable_names, read_config
from qlora_train.model.base_folder import check_base
from qlora_train.model.decoder import FrozenDecoder
from qlora_train.model.lora_parameters import LoraParameters
from qlora_train.model.probe import ProbeResult
from qlora_train.model.rope_lengths import refuse_length_dependent_rope
from qlora_train.model.served_model import ServedModel, served_model
from qlora_train.model.token_rows import initial_rows
from qlora_train.plan.fixed_bytes import managed_bytes
from qlora_train.plan.machine_plan import enforce_budget, plan_here
from qlora_train.plan.model_shape import shape_of
from qlora_train.plan.plan import Plan
from qlora_train.plan.split import batch_size_of, stated_micro_batch_size
from qlora_train.plan.unpinned import host_memory_of_run
from qlora_train.quant.formats import Quantization
from qlora_train.recipe import LoraSection, Recipe
from qlora_train.train.launch import join_launch
from qlora_train.train.plan_log import SavedPlan
from qlora_train.train.samples import SampleAnswers
from qlora_train.weights.cache_key import cache_root
from qlora_train.weights.execution_plan import ExecutionPlan
from qlora_train.weights.host_memory import HostMemory
from qlora_train.weights.load import load_base
from qlora_train.weights.ranks import Ranks

NO_TOKENS = AddedTokens()


@dataclass(frozen=True)
class RunContext:
    """What every part of a run's start-up needs. recipe: see `resolve`. dtype: the compute dtype. target: the
    least capable device of all ranks. log: called with a line about each thing that takes time."""

    recipe: Recipe
    base_folder: Path
    dtype: torch.dtype
    device: ComputeDevice
    ranks: Ranks
    target: DeviceDescription
    log: Callable[[str], None]


@dataclass(frozen=True)
class AdaptedModel:
    """The base and its LoRA parameters, placed as planned. plan: made for this machine, with the split that
    is followed. execution: the one that is followed: `plan`'s, or that of the resumed run. host: the run's
    host memory."""

    plan: Plan
    execution: ExecutionPlan
    host: HostMemory
    decoder: FrozenDecoder
    lora: LoraParameters
    adapter: TrainedAdapter


@dataclass(frozen=True)
class TrainedAdapter:
    """What is saved beside the trained LoRA parameters. paths: the module paths in the written adapter. kept:
    A and B that are applied but not trained (the head's). factors: the principal parts that PiSSA took; empty
    without it."""

    config: AdapterConfig
    paths: Mapping[str, str]
    kept: LoraPairs
    factors: Factors

    def save(self, folder: Path, trained: LoraPairs, other_files: Mapping[str, str]) -> None:
        """Write the adapter for other tools, which have the original base. trained: the trained parameters by
        module path."""
        config, lora = self.config, trained | self.kept
        if self.factors:
            config, lora = as_plain_lora(config, lora, self.factors)
        named = {self.paths[path]: tensors for path, tensors in lora.items()}
        save_adapter(folder, config.renamed(self.paths), named, other_files)


@dataclass(frozen=True)
class Prepared:
    """The parts of a run, ready to train. recipe: resolved (absolute base, commit, compute dtype, batch
    size). samples: None: none are asked for."""

    recipe: Recipe
    accelerator: Accelerator
    tokenizer: PreTrainedTokenizerBase
    train_data: PackedDataset
    eval_data: PackedDataset | None
    model: AdaptedModel
    trained_on: TrainedOn
    samples: SampleAnswers | None


def make_accelerator(recipe: Recipe) -> Accelerator:
    """Apply the run's torch settings and join the launch's processes. Raises `UserError` for a tracker that
    is not installed; see `join_launch`."""
    absent = [name for name in recipe.training.report_to if importlib.util.find_spec(name) is None]
    if absent:
        raise UserError(
            f"training.report_to: {', '.join(absent)} is not installed; pip install "
            f"'qlora-train[{','.join(absent)}]', or remove it from the list"
        )
    if recipe.training.deterministic is True:
        make_deterministic()
    apply_settings()
    return join_launch(list(recipe.training.report_to), Path(recipe.training.output_dir))


def resolve(recipe: Recipe, device: DeviceDescription, num_ranks: int) -> tuple[Recipe, Path, torch.dtype]:
    """(recipe with `auto`, hub names, `lora.init_from` and batch sizes resolved, the base's folder, compute
    dtype). device: the least capable of all ranks."""
    folder, commit = find_base(recipe.model, Path(recipe.training.output_dir))
    check_base(folder, recipe.model.quantization, needs_originals=is_pissa(recipe.lora))
    dtype = resolve_dtype(recipe.model.compute_dtype, device)
    base = recipe.model.base if commit is not None else str(folder)
    model = recipe.model.model_copy(
        update={"base": base, "compute_dtype": dtype_name(dtype), "revision": commit}
    )
    lora = recipe.lora
    if lora.init_from is not None:
        lora = as_continued(lora, *adaptable_names(read_config(folder)))
        trained_on = read_trained_on(Path(recipe.lora.init_from or ""))
        if trained_on is not None:
            trained_on.check_base(folder, Path(recipe.lora.init_from or ""))
    training = recipe.training.model_copy(
        update={
            "batch_size": batch_size_of(recipe.training, num_ranks),
            "micro_batch_size": stated_micro_batch_size(recipe.training, num_ranks) or "auto",
            "gradient_accumulation_steps": None,
        }
    )
    return recipe.model_copy(update={"model": model, "lora": lora, "training": training}), folder, dtype


def prepare(
    run: RunContext, data: OpenData, accelerator: Accelerator, saved: SavedPlan | None, *, use_cache: bool
) -> Prepared:
    """Read the data, make the plan, load the base and attach LoRA parameters.

    data: the opened files of the recipe's data section. saved: the plan of the resumed run, which is followed
    so that sums keep their order. use_cache: keep the quantized base, and the tokens of large data, for later
    starts. Raises a `UserError` for contradictory input and for a plan that does not fit.
    """
    recipe, folder = run.recipe, run.base_folder
    config = read_config(folder)
    refuse_length_dependent_rope(config, recipe.data.sequence_length)
    probed = shape_of(config).probed
    tokenizer, added = tokenizer_of_run(recipe.model, str(folder))
    for line in added.remarks:
        run.log(line)
    cache = cache_root() if use_cache else None
    with run.ranks.leaders_first():  # one rank fills the token cache, the others map it
        train_data, eval_data = build_dataset(
            data,
            tokenizer,
            seed=recipe.training.seed,
            stop_ids=read_stop_ids(str(folder)),
            vocabulary_size=added.vocabulary_size(config.vocab_size),
            cache=cache,
        )
    asked = recipe.training.samples
    samples = None if asked is None else SampleAnswers(asked, recipe.data, tokenizer, config, str(folder))
    num_bins = recipe.training.num_bins(train_data.num_bins)
    model = load_adapted_model(
        run,
        probed,
        saved,
        lambda micro_batch_size: train_data.most_documents(micro_batch_size, num_bins),
        cache,
        added,
    )
    trained_on = TrainedOn.of(recipe.model, folder, Path(recipe.training.output_dir), tokenizer)
    return Prepared(recipe, accelerator, tokenizer, train_data, eval_data, model, trained_on, samples)


def load_adapted_model(
    run: RunContext,
    probed: ProbeResult,
    saved: SavedPlan | None,
    most_documents: Callable[[int], int],
    cache: Path | None,
    added: AddedTokens = NO_TOKENS,
) -> AdaptedModel:
    """Make the plan for this machine, load the base and attach LoRA parameters.

    probed: result of probing the base's config. saved: a plan to follow instead; the first rank's counts for
    all. most_documents: the largest number in any micro-batch of so many bins. cache: the folder of quantized
    bases; None: none is kept. added: tokens whose rows are trained. Raises a `UserError` for a plan that does
    not fit.
    """
    recipe, device, ranks = run.recipe, run.device, run.ranks
    values_of_first = ranks.gather(None if saved is None else saved.to_dict())[0]
    saved = None if values_of_first is None else SavedPlan.from_dict(values_of_first)
    plan = plan_here(
        recipe,
        run.base_folder,
        run.dtype,
        device,
        most_documents,
        ranks,
        run.target,
        split=None if saved is None else saved.split,
        keeps_quantized_base=cache is not None or is_pissa(recipe.lora),
    )
    plan.require_fit()
    enforce_budget(
        device, plan.workload, recipe.memory.vram_bytes, managed_bytes=managed_bytes(plan.workload)
    )
    execution = plan.execution if saved is None else saved.execution
    host = host_memory_of_run(plan, execution, device, run.log)
    quantization = Quantization(recipe.model.quantization, recipe.model.double_quant)
    decoder = load_base(
        run.base_folder,
        quantization,
        run.dtype,
        device,
        plan=execution,
        cache=cache,
        host=host,
        ranks=ranks,
        log=run.log,
        lora=recipe.lora,
    )
    decoder.skippable = probed.skippable
    if recipe.training.kernels == "auto":
        decoder.fuse(norms=probed.fuses_norms, mlps=probed.fuses_mlps, qkv=probed.fuses_qkv)
    lora, adapter = attach_lora(recipe, run.base_folder, decoder, run.dtype, added)
    device.release_cached()  # what loading and quantizing took would stay beside other sizes
    return AdaptedModel(plan, execution, host, decoder, lora, adapter)


def attach_lora(
    recipe: Recipe,
    base_folder: Path,
    decoder: FrozenDecoder,
    dtype: torch.dtype,
    added: AddedTokens = NO_TOKENS,
) -> tuple[LoraParameters, TrainedAdapter]:
    """Attach LoRA parameters as the resolved recipe says, and rows of added tokens, with the values of
    `lora.init_from` if given."""
    chosen = choose_targets(recipe.lora, decoder.linears, decoder.stacks)
    start, kept, kept_targets = _continued_values(recipe.lora, decoder, added)
    served = served_model(base_folder, decoder.adaptable, decoder.matrix_paths)
    config = _adapter_config(recipe, chosen | kept_targets, decoder, served, added)
    lora = _lora_parameters(recipe, chosen, config, decoder, dtype, added)
    if decoder.principal_factors:
        start = initial_values(config, decoder.principal_factors)
    if start:
        first_rows = {path: (rows,) for path, rows in lora.token_rows(lora.masters).items()}
        lora.load(first_rows | start)
    if recipe.lora.init_from is not None and kept:
        decoder.adapt_head(kept[HEAD], config.scaling_of(HEAD), head_copy(Path(recipe.lora.init_from)))
    return lora, TrainedAdapter(config, served.paths, kept, decoder.principal_factors)


def _continued_values(
    section: LoraSection, decoder: FrozenDecoder, added: AddedTokens
) -> tuple[LoraPairs, LoraPairs, dict[str, LoraTarget]]:
    """(values of the parameters that are trained, A and B that are kept as they are, rank and alpha of
    these), from the adapter that training continues; empty without one."""
    if section.init_from is None:
        return {}, {}, {}
    existing = [*decoder.adaptable, *decoder.matrix_paths, HEAD]
    saved, start = load_fitting(Path(section.init_from), existing)
    _refuse_other_tokens(section.init_from, saved, start, added)
    if len(start.get(HEAD, ())) < 2:
        return start, {}, {}
    return start, {HEAD: start.pop(HEAD)}, {HEAD: LoraTarget(saved.rank_of(HEAD), saved.alpha_of(HEAD))}


def _adapter_config(
    recipe: Recipe,
    targets: Mapping[str, LoraTarget],
    decoder: FrozenDecoder,
    served: ServedModel,
    added: AddedTokens,
) -> AdapterConfig:
    """The config of the adapter that is written. targets: of all modules in it, by path in the decoder."""
    section = recipe.lora
    names, layers = name_targets(
        [served.paths[path] for path in targets if path not in decoder.stacks], served.linears
    )
    parameters = name_parameters(
        {served.paths[path] for path in targets.keys() & decoder.stacks.keys()},
        [served.paths[path] for path in decoder.stacks],
    )
    return AdapterConfig(
        base_model=recipe.model.base,
        rank=section.rank,
        alpha=section.alpha,
        dropout=section.dropout,
        target_modules=names,
        use_rslora=section.use_rslora,
        rank_pattern={path: target.rank for path, target in targets.items()},
        alpha_pattern={path: target.alpha for path, target in targets.items()},
        layers=layers,
        use_dora=section.use_dora,
        target_parameters=parameters,
        lora_bias=section.lora_bias,
        auto_mapping=served.auto_mapping,
        token_ids=added.ids,
    )


def _lora_parameters(
    recipe: Recipe,
    chosen: Mapping[str, LoraTarget],
    config: AdapterConfig,
    decoder: FrozenDecoder,
    dtype: torch.dtype,
    added: AddedTokens,
) -> LoraParameters:
    """The LoRA parameters of the chosen modules and the rows of added tokens, attached to the decoder."""
    section, device = recipe.lora, decoder.device.torch
    matrices = zip(decoder.matrix_paths, (decoder.embedding, decoder.head), strict=False)
    lora = LoraParameters(
        {path: decoder.adaptable[path] for path in chosen},
        rank={path: target.rank for path, target in chosen.items()},
        scaling={path: config.scaling_of(path) for path in chosen},
        dropout=section.dropout,
        seed=recipe.training.seed,
        dtype=dtype,
        device=device,
        use_dora=section.use_dora,
        lora_bias=section.lora_bias,
        token_rows={
            path: initial_rows(stored, added.parts, device)
            for path, stored in (matrices if added.ids else ())
        },
    )
    if added.ids:
        decoder.set_token_rows(added.ids, lora.token_rows(lora.working), lora.token_rows(lora.gradient))
    return lora


def _refuse_other_tokens(folder: str, saved: AdapterConfig, start: LoraPairs, added: AddedTokens) -> None:
    """Raise `BaseModelError` where an adapter that training continues does not go with the added tokens."""
    if saved.token_ids not in ((), added.ids):
        raise BaseModelError(
            f"lora.init_from: {folder} has trained rows of the tokens {list(saved.token_ids)}, and "
            f"model.add_tokens names {list(added.ids) or 'none'}. Name the tokens that it was trained with."
        )
    if added.ids and len(start.get(HEAD, ())) > 1:
        raise BaseModelError(
            f"model.add_tokens: {folder} has LoRA parameters on {HEAD}, in which no rows of tokens can be "
            "trained besides. Merge it into its base with peft, and train on the merged model."
        )
