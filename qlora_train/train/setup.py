"""Everything that must be right before a run folder is touched: device, data, base, factors. Bad input ends
here."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from accelerate import Accelerator
from transformers import PreTrainedTokenizerBase

from qlora_train.data.building import OpenData, build_dataset
from qlora_train.data.dataset import PackedDataset
from qlora_train.data.tokenizer import load_tokenizer, read_stop_ids
from qlora_train.device.compute import ComputeDevice
from qlora_train.device.description import DeviceDescription
from qlora_train.device.settings import apply_settings, make_deterministic
from qlora_train.errors import UserError
from qlora_train.memory.execution import ExecutionPlan
from qlora_train.memory.host_memory import HostMemory
from qlora_train.memory.load import load_base
from qlora_train.memory.machine_plan import enforce_budget, plan_here
from qlora_train.memory.packed_cache import cache_root
from qlora_train.memory.plan.byte_model import managed_bytes
from qlora_train.memory.plan.plan import Plan
from qlora_train.memory.ranks import ALONE, Ranks
from qlora_train.memory.unpinned import host_memory_of_run
from qlora_train.model.adapter_config import HEAD, AdapterConfig, name_targets
from qlora_train.model.adapter_files import Factors, head_copy, load_fitting
from qlora_train.model.base import linear_names, read_config
from qlora_train.model.base_folder import check_base
from qlora_train.model.continued_adapter import as_continued
from qlora_train.model.decoder import FrozenDecoder
from qlora_train.model.factors import FactorBuffers, select_targets
from qlora_train.model.hub import dtype_name, resolve_dtype
from qlora_train.model.probe import ProbeResult, probe
from qlora_train.model.quantize import Packing
from qlora_train.model.rope_lengths import refuse_length_dependent_rope
from qlora_train.model.trained_on import TrainedOn, find_base, read_trained_on
from qlora_train.recipe import Recipe
from qlora_train.train.launch import join_launch
from qlora_train.train.schedule import num_rows


@dataclass(frozen=True)
class LoadedModel:
    """The base and its factors, where the plan puts them. plan: what this machine could do. execution: what
    is done. host: for what waits in RAM."""

    plan: Plan
    execution: ExecutionPlan
    host: HostMemory
    decoder: FrozenDecoder
    factors: FactorBuffers
    adapter: TrainedAdapter


@dataclass(frozen=True)
class TrainedAdapter:
    """What is written beside the trained factors. kept: factors that are applied, but not trained (a
    head's)."""

    config: AdapterConfig
    kept: Factors


@dataclass(frozen=True)
class Prepared:
    """The parts of a run. recipe: resolved (absolute base, commit, compute dtype). plan: what this machine
    could do. execution: what the run does: the plan's, or that of the checkpoint it goes on from. host:
    for what waits in RAM."""

    recipe: Recipe
    accelerator: Accelerator
    tokenizer: PreTrainedTokenizerBase
    train_data: PackedDataset
    eval_data: PackedDataset | None
    decoder: FrozenDecoder
    factors: FactorBuffers
    adapter: TrainedAdapter
    trained_on: TrainedOn
    plan: Plan
    execution: ExecutionPlan
    host: HostMemory


def make_accelerator(recipe: Recipe) -> Accelerator:
    """Tell torch what the run wants of it and join the launch's processes."""
    absent = [name for name in recipe.training.report_to if importlib.util.find_spec(name) is None]
    if absent:
        raise UserError(
            f"training.report_to: {', '.join(absent)} is not installed; pip install it or remove it "
            "from the list"
        )
    if recipe.training.deterministic is True:
        make_deterministic()
    apply_settings()
    return join_launch(list(recipe.training.report_to), Path(recipe.training.output_dir))


def resolve(recipe: Recipe, device: DeviceDescription) -> tuple[Recipe, Path, torch.dtype]:
    """The recipe with what "auto", hub names and `lora.init_from` stand for here, the base's folder and the
    compute dtype. device: of all ranks."""
    folder, commit = find_base(recipe.model, Path(recipe.training.output_dir))
    check_base(folder, recipe.model.quantization)
    dtype = resolve_dtype(recipe.model.compute_dtype, device)
    base = recipe.model.base if commit is not None else str(folder)
    model = recipe.model.model_copy(
        update={"base": base, "compute_dtype": dtype_name(dtype), "revision": commit}
    )
    lora = recipe.lora
    if lora.init_from is not None:
        lora = as_continued(lora, linear_names(read_config(folder)))
        trained_on = read_trained_on(Path(recipe.lora.init_from or ""))
        if trained_on is not None:
            trained_on.check_base(folder, Path(recipe.lora.init_from or ""))
    return recipe.model_copy(update={"model": model, "lora": lora}), folder, dtype


def prepare(
    recipe: Recipe,
    folder: Path,
    dtype: torch.dtype,
    data: OpenData,
    accelerator: Accelerator,
    device: ComputeDevice,
    *,
    ranks: Ranks = ALONE,
    target: DeviceDescription | None = None,
    saved_execution: ExecutionPlan | None = None,
    use_cache: bool = True,
    say: Callable[[str], None] = print,
) -> Prepared:
    """Read data, plan, load the base.

    recipe: resolved. data: of its data section. target: what the devices of all ranks can do; None: this
    one's. saved_execution: of the checkpoint that is gone on from; it is followed, so that sums keep their
    order. use_cache: keep the packed base, and the tokens of large data, for later starts. say: told a line
    each about what takes time. Raises a `UserError` for whatever does not fit together, a plan that does not
    fit included.
    """
    config = read_config(folder)
    refuse_length_dependent_rope(config, recipe.data.sequence_length)
    found = probe(config)
    tokenizer = load_tokenizer(str(folder), None, recipe.model.chat_template)
    cache = cache_root() if use_cache else None
    with ranks.leaders_first():  # one rank tokenises what is kept, the others map it
        train_data, eval_data = build_dataset(
            data,
            tokenizer,
            seed=recipe.training.seed,
            stop_ids=read_stop_ids(str(folder)),
            vocabulary_size=config.vocab_size,
            cache=cache,
        )
    loaded = load_model(
        recipe,
        folder,
        dtype,
        device,
        found,
        lambda planned: saved_execution or planned,
        most_documents=train_data.most_documents(
            recipe.training.micro_batch_size,
            num_rows(recipe.training, train_data.num_bins, accelerator.num_processes),
        ),
        ranks=ranks,
        target=target,
        cache=cache,
        say=say,
    )
    return Prepared(
        recipe,
        accelerator,
        tokenizer,
        train_data,
        eval_data,
        loaded.decoder,
        loaded.factors,
        loaded.adapter,
        TrainedOn.of(recipe.model, folder, Path(recipe.training.output_dir), tokenizer),
        loaded.plan,
        loaded.execution,
        loaded.host,
    )


def load_model(
    recipe: Recipe,
    folder: Path,
    dtype: torch.dtype,
    device: ComputeDevice,
    found: ProbeResult,
    choose: Callable[[ExecutionPlan], ExecutionPlan],
    *,
    most_documents: int,
    ranks: Ranks = ALONE,
    target: DeviceDescription | None = None,
    cache: Path | None,
    say: Callable[[str], None],
) -> LoadedModel:
    """Plan for this machine, load the base and attach the factors.

    recipe: resolved. found: by the probe of the base's config. choose: from what was planned to what is done;
    the first rank's choice holds for all. most_documents: in any micro-batch. target: see `prepare`. cache:
    the folder of packed bases; None: none is kept. Raises a `UserError` for a plan that does not fit.
    """
    plan = plan_here(recipe, folder, dtype, device, most_documents, ranks, target)
    plan.require_fit()
    enforce_budget(
        device, plan.workload, recipe.memory.vram_bytes, managed_bytes=managed_bytes(plan.workload)
    )
    execution = ExecutionPlan.from_dict(ranks.gather(choose(plan.execution).to_dict())[0])
    host = host_memory_of_run(plan, execution, device, say)
    packing = Packing(recipe.model.quantization, recipe.model.double_quant)
    decoder = load_base(
        folder, packing, dtype, device, plan=execution, cache=cache, host=host, ranks=ranks, say=say
    )
    decoder.tail_name = found.tail_name
    if recipe.training.kernels == "auto":
        decoder.fuse(norms=found.fuses_norms, mlps=found.fuses_mlps, qkv=found.fuses_qkv)
    factors, adapter = attach_factors(recipe, decoder, dtype)
    device.release_cached()  # what loading and packing took would stay beside other sizes
    return LoadedModel(plan, execution, host, decoder, factors, adapter)


def attach_factors(
    recipe: Recipe, decoder: FrozenDecoder, dtype: torch.dtype
) -> tuple[FactorBuffers, TrainedAdapter]:
    """LoRA factors as the recipe (resolved) says, continued from `lora.init_from` where it is given."""
    lora = recipe.lora
    targets = select_targets(decoder.linears, lora.target_modules)
    config = AdapterConfig(recipe.model.base, lora.rank, lora.alpha, lora.dropout, use_rslora=lora.use_rslora)
    start: Factors = {}
    if lora.init_from is not None:
        saved, start = load_fitting(Path(lora.init_from), [*decoder.linears, HEAD])
        config = replace(config, rank_pattern=saved.rank_pattern, alpha_pattern=saved.alpha_pattern)
    kept = {HEAD: start.pop(HEAD)} if HEAD in start else {}
    names, layers = name_targets([*targets, *kept], [*decoder.linears, HEAD])
    config = replace(config, target_modules=names, layers=layers)
    factors = FactorBuffers(
        targets,
        rank={name: config.rank_of(name) for name in targets},
        scaling={name: config.scaling_of(name) for name in targets},
        dropout=lora.dropout,
        seed=recipe.training.seed,
        dtype=dtype,
        device=decoder.device.torch,
    )
    if lora.init_from is not None:
        factors.load(start)
    if lora.init_from is not None and kept:
        decoder.adapt_head(kept[HEAD], config.scaling_of(HEAD), head_copy(Path(lora.init_from)))
    return factors, TrainedAdapter(config, kept)
