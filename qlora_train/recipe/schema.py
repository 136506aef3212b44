"""The recipe: all settings of a run, typed, in one YAML file.

A recipe is read in four steps, and the problems of all steps are reported at once, with their lines:

1. *parse*: YAML 1.2 into plain values. PyYAML follows YAML 1.1, reads `1e-5` as text and lets the second of
   two equal keys win; here `1e-5` is a number and a duplicate key is a problem.
2. *override*: `training.learning_rate=1e-4` from the command line, its value read by the same YAML rules.
   The length is given as `epochs` or as `max_steps`: overriding one replaces the other.
3. *cross-check*: keys that contradict each other (`recipe/checks.contradictions`). This looks at **written**
   values, before defaults: `quantization: int8` is valid, but not together with `double_quant: true`.
4. *type-check*: the models below. Unknown keys are refused, with the nearest valid one, so that no key is
   silently ignored.

`null` for a whole section means its defaults, and so does `double_quant: null`.

Relative paths of what is read (`model.base`, `model.chat_template`, `lora.init_from`, `data.train`,
`data.eval`) are searched beside the recipe file, then in the current folder, then among the bundled recipes
(`quickstart/base`); a path that exists becomes absolute, any other is kept, as it may be a hub id.
`training.output_dir` is relative to the current folder. `~` is the home folder in all of them.

This module imports no torch, so that `qlora-train --help` is fast.
"""

from __future__ import annotations

import math
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Discriminator,
    Field,
    Tag,
    ValidationError,
)

from qlora_train.errors import RecipeError
from qlora_train.recipe.checks import (
    FOUR_BIT,
    MESSAGES,
    MOST_BINS,
    MOST_TOKENS,
    all_different,
    as_alpha,
    as_initialisation,
    as_layers,
    as_names,
    as_pattern,
    as_prompts,
    as_sources,
    as_targets,
    as_tokens,
    as_trackers,
    auto_or_bins,
    auto_or_count,
    contradictions,
    expanded,
    nameable,
    not_blank,
    parse_size,
    with_dependent_defaults,
)
from qlora_train.recipe.files import bundled_recipes_dir, find_recipe, is_run_folder
from qlora_train.recipe.other_trainers import answer_to
from qlora_train.recipe.yaml_file import MAX_PROBLEMS, Draft, KeyPath, nearest, show, yaml_text


def _auto_or_bool(value: Any) -> Any:
    if value != "auto" and not isinstance(value, bool):  # a Literal would take 1 for True
        raise ValueError(f"must be auto, true or false, got {show(value)}")
    return value


def _not_root(path: str) -> str:
    if not os.path.abspath(path).strip(os.sep):
        raise ValueError("is the root of the file system; name a folder for the run")
    return path


def _not_empty(sources: tuple[Any, ...]) -> tuple[Any, ...]:
    if not sources:
        raise ValueError("names no source")
    return sources


def _share_or_sources(value: Any) -> str:
    return "<share>" if isinstance(value, int | float) else "<sources>"


class _Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, allow_inf_nan=False)


Text = Annotated[str, Field(min_length=1)]
PathText = Annotated[Text, AfterValidator(nameable), AfterValidator(expanded)]
Texts = Annotated[tuple[Text, ...], Field(strict=False)]  # strict tuples would refuse YAML's lists
Count = Annotated[int, Field(ge=1)]
Bins = Annotated[int, Field(ge=1, le=MOST_BINS)]
Positive = Annotated[float, Field(gt=0)]
LARGEST_FACTOR = 1e6
"""The largest learning rate, ratio or weight decay: beyond, the optimizers' fp32 arithmetic may overflow."""
PositiveBounded = Annotated[float, Field(gt=0, le=LARGEST_FACTOR)]
AutoOrBool = Annotated[Literal["auto"] | bool, BeforeValidator(_auto_or_bool)]
Tracker = Literal["tensorboard", "wandb", "mlflow", "trackio"]


class NewToken(_Section):
    """A token whose row is trained. special: a control token, which answers are shown without."""

    token: Annotated[Text, AfterValidator(not_blank)]
    special: bool = False


NewTokens = Annotated[
    tuple[NewToken, ...], Field(strict=False), BeforeValidator(as_tokens), AfterValidator(all_different)
]


class ModelSection(_Section):
    """The frozen base and its quantization, but for experts in MXFP4, which stay so. `double_quant` is False
    wherever it does not apply. `add_tokens`: the rows of these in embedding and head are trained."""

    base: PathText
    revision: Text | None = None
    quantization: Literal["nf4", "fp4", "int8", "none"] = "nf4"
    double_quant: bool = True
    compute_dtype: Literal["auto", "bfloat16", "float16", "float32"] = "auto"
    chat_template: Text | None = None
    add_tokens: NewTokens = ()


Rank = Annotated[int, Field(ge=1, le=65_536)]
Alpha = Annotated[int | float, BeforeValidator(as_alpha)]


class LoraSection(_Section):
    """The trained LoRA parameters: y += (alpha / rank) B A x, or alpha / sqrt(rank) with `use_rslora`.
    With `use_dora`, the length of every row of W + (alpha / rank) B A is trained too (model/magnitude.py);
    with `lora_bias` a bias of B, which is scaled as B is.
    `init_lora_weights`: pissa, or pissa_niter_N, starts from the weights' principal parts (adapter/pissa.py).

    Which weights have them, of which rank and alpha: keys of PEFT with its meaning (module_patterns.py)."""

    rank: Rank = 16
    alpha: Alpha = 32
    dropout: Annotated[float, Field(ge=0, lt=1)] = 0.0
    target_modules: Annotated[Text | Texts, BeforeValidator(as_targets)] = "all-linear"
    target_parameters: Texts | None = None
    exclude_modules: Annotated[Text | Texts | None, BeforeValidator(as_names)] = None
    layers_to_transform: Annotated[tuple[int, ...] | None, BeforeValidator(as_layers)] = None
    rank_pattern: Annotated[dict[Text, Rank], BeforeValidator(as_pattern)] = Field(default_factory=dict)
    alpha_pattern: Annotated[dict[Text, Alpha], BeforeValidator(as_pattern)] = Field(default_factory=dict)
    use_rslora: bool = False
    use_dora: bool = False
    lora_bias: bool = False
    init_lora_weights: Annotated[bool | str, BeforeValidator(as_initialisation)] = True
    init_from: PathText | None = None


class DataSource(_Section):
    """A source of rows: a file, a folder or a hub id. name: the configuration of a hub data set that has
    several. split: of a folder or hub id. weight: how often each row is used in an epoch (2: twice; 0.5: half
    of the rows, chosen once by the seed)."""

    path: PathText
    name: Text | None = None
    split: Text | None = None
    weight: Annotated[Positive, BeforeValidator(lambda value: 1.0 if value is None else value)] = 1.0


Sources = Annotated[
    tuple[DataSource, ...], Field(strict=False), BeforeValidator(as_sources), AfterValidator(_not_empty)
]
Share = Annotated[float, Field(gt=0, lt=1)]


class DataSection(_Section):
    """The data: sources of rows, their format, and packing. `sequence_length` is in tokens."""

    train: Sources
    eval: (
        Annotated[
            Annotated[Share, Tag("<share>")] | Annotated[Sources, Tag("<sources>")],
            Discriminator(_share_or_sources),
        ]
        | None
    ) = None
    format: Literal["auto", "messages", "sharegpt", "alpaca", "prompt_completion", "text"] = "auto"
    columns: dict[str, Text | None] = Field(default_factory=dict)
    prompt_template: Text | None = None
    supervise: Literal["completions", "last_turn", "all"] = "completions"
    open_thought: Literal["close", "refuse"] = "close"
    chat_template_kwargs: dict[str, Any] = Field(default_factory=dict)
    on_bad_row: Literal["stop", "skip"] = "stop"
    too_long: Literal["cut", "drop", "split"] = "cut"
    sequence_length: Annotated[int, Field(ge=2, le=MOST_TOKENS)] = 2048
    packing: bool = True


class EarlyStopping(_Section):
    """A run ends after `patience` evaluations in a row that did not lower the loss by more than `min_delta`
    below the last one that did."""

    patience: Count
    min_delta: Annotated[float, Field(ge=0)] = 0.0


MOST_SAMPLE_TOKENS = 128
"""New tokens of a sample, for which every plan has room."""


class Samples(_Section):
    """Prompts, texts or conversations, that the model answers before and after training, and after `every`
    steps (null: not on the way)."""

    prompts: Annotated[tuple[Any, ...], BeforeValidator(as_prompts)]
    every: Count | None = None
    max_new_tokens: Annotated[int, Field(ge=1, le=MOST_SAMPLE_TOKENS)] = 64


class TrainingSection(_Section):
    """The training loop. `epochs` is None where `max_steps` gives the length. `*_every` are in optimizer
    steps (`save_every: auto`: about every 10 minutes; null: at the end and when stopped). `batch_size` is the
    bins of all processes in a step (None: micro_batch_size x gradient_accumulation_steps x processes)."""

    output_dir: Annotated[PathText, AfterValidator(_not_root)] = "runs/my-run"
    seed: Annotated[int, Field(ge=0, lt=2**32)] = 0
    epochs: Positive | None = 1.0
    max_steps: Count | None = None
    batch_size: Bins | None = None
    micro_batch_size: Annotated[Literal["auto"] | Bins, BeforeValidator(auto_or_bins)] = "auto"
    gradient_accumulation_steps: Bins | None = None
    learning_rate: PositiveBounded = 2.0e-4
    lora_b_lr_ratio: PositiveBounded = 1.0
    lr_schedule: Literal["cosine", "linear", "constant"] = "cosine"
    warmup_ratio: Annotated[float, Field(ge=0, le=1)] = 0.03
    optimizer: Literal["paged_adamw_8bit", "paged_adamw_32bit", "adamw_8bit", "adamw"] = "paged_adamw_8bit"
    weight_decay: Annotated[float, Field(ge=0, le=LARGEST_FACTOR)] = 0.0
    max_grad_norm: Positive = 1.0
    kernels: Literal["auto", "reference"] = "auto"
    deterministic: AutoOrBool = "auto"
    log_every: Count = 1
    eval_every: Count | None = None
    early_stopping: EarlyStopping | None = None
    samples: Samples | None = None
    save_every: Annotated[Literal["auto"] | Count | None, BeforeValidator(auto_or_count)] = "auto"
    keep_checkpoints: Count = 2
    report_to: Annotated[tuple[Tracker, ...], Field(strict=False), BeforeValidator(as_trackers)] = ()

    def num_bins(self, bins_per_epoch: int) -> int:
        """Bins of the whole run on all ranks: max_steps full steps, or the epochs to their last bin."""
        if self.max_steps is not None:
            return self.max_steps * self.bins_per_step()
        return math.ceil((self.epochs or 1) * bins_per_epoch)

    def num_steps(self, bins_per_epoch: int) -> int:
        """Optimizer steps of the whole run; the last one may have fewer bins."""
        return math.ceil(self.num_bins(bins_per_epoch) / self.bins_per_step())

    def bins_per_step(self, num_ranks: int = 1) -> int:
        """Bins of an optimizer step on all ranks, whose number only counts where `batch_size` is None."""
        if self.batch_size is not None:
            return self.batch_size
        assert isinstance(self.micro_batch_size, int) and self.gradient_accumulation_steps is not None
        return self.micro_batch_size * self.gradient_accumulation_steps * num_ranks


def _auto_or_size(value: Any) -> Any:
    if value != "auto":
        parse_size(value)
    return value


class MemorySection(_Section):
    """Placement of weights and activations. `vram` is the budget of device memory, as a size with its unit.
    Values other than `auto` apply to every layer."""

    vram: Annotated[Text, BeforeValidator(_auto_or_size)] = "auto"
    weights: Literal["auto", "resident", "ram", "disk"] = "auto"
    activations: Literal["auto", "keep", "recompute", "offload"] = "auto"

    @property
    def vram_bytes(self) -> int | None:
        """The budget in bytes; None for auto."""
        return None if self.vram == "auto" else parse_size(self.vram)


class Recipe(_Section):
    """A whole recipe. Make one with `load_recipe` or `Recipe.from_dict`, which run every check.

    Its fields are the sections of the YAML file, immutable; `data.train` is a tuple of `DataSource`.
    """

    model: ModelSection
    lora: LoraSection = LoraSection()
    data: DataSection
    training: TrainingSection = TrainingSection()
    memory: MemorySection = MemorySection()

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Recipe:
        """The recipe of nested plain values. Raises `RecipeError` with all problems."""
        return _finish(Draft.of_dict(values, folders=(Path.cwd(), bundled_recipes_dir())))

    def to_dict(self) -> dict[str, Any]:
        """All keys as nested plain values, from which `from_dict` makes an equal recipe."""
        values = self.model_dump(mode="json")
        if self.model.quantization not in FOUR_BIT:
            values["model"]["double_quant"] = None  # a written value would contradict
        return values

    def to_yaml(self) -> str:
        """`to_dict` as YAML, which is saved with a run."""
        return yaml_text(self.to_dict())


def load_recipe(path: str | Path, overrides: Sequence[str] = ()) -> Recipe:
    """The recipe in a file, in a folder's `recipe.yaml`, or bundled under this name.

    In a run folder, `training.output_dir` becomes that folder, wherever it lies now. overrides:
    `section.key=value`. Raises `RecipeError` with all problems, each with its line.
    """
    file = find_recipe(path)
    found_in = (Path.cwd(), bundled_recipes_dir())
    draft = Draft.of_file(file, folders=(file.resolve().parent, *found_in))
    if not is_run_folder(file.parent):
        draft.override(overrides, folders=found_in)
        return _finish(draft)
    draft.put(("training", "output_dir"), str(file.parent))
    draft.override(overrides, folders=found_in)
    try:
        return _finish(draft)
    except RecipeError as error:
        if all(problem.startswith("override ") for problem in error.problems):
            raise
        hint = "an older version of qlora_train may have begun this run; its recipe has other keys"
        raise RecipeError([*error.problems, f"{file.parent}: {hint}"]) from error


def _finish(draft: Draft) -> Recipe:
    """Cross-check, fill dependent defaults, type-check. Raises `RecipeError` with all problems."""
    for name in Recipe.model_fields:
        if draft.values.get(name) is None:
            draft.values[name] = {}
    draft.problems += contradictions(draft.values)
    try:
        recipe = Recipe.model_validate(with_dependent_defaults(draft.values))
    except ValidationError as error:
        draft.problems += [_problem(details) for details in error.errors()[: MAX_PROBLEMS + 1]]
    if draft.problems:
        raise RecipeError(draft.report())
    return recipe


def _problem(details: Any) -> tuple[KeyPath, str]:
    """(key, message for a recipe's author) of one pydantic error."""
    kind, context, value = details["type"], dict(details.get("ctx", {})), details["input"]
    path: KeyPath = tuple(part for part in details["loc"] if not str(part).startswith("<"))
    if kind == "extra_forbidden":
        return path, "unknown key" + _instead_of(path, value)
    choices = context["expected"] = context.get("expected", "").replace("'", "")
    message = MESSAGES[kind].format(**context) if kind in MESSAGES else details["msg"]
    if kind not in ("missing", "value_error"):
        message += f", got {show(value)}"
    if kind == "literal_error":
        message += nearest(str(value), choices.replace(" or ", ", ").split(", "))
    return path, message


def _instead_of(path: KeyPath, value: Any) -> str:
    """The answer to another trainer's setting, else the nearest key of the section, else of any section."""
    sections = {name: field.annotation for name, field in Recipe.model_fields.items()}
    keys = {name: list(s.model_fields) for name, s in sections.items() if isinstance(s, type(_Section))}
    nested: dict[str, type[_Section]] = {
        "add_tokens": NewToken,
        "early_stopping": EarlyStopping,
        "samples": Samples,
    }
    items = next((nested[str(key)] for key in path if key in nested), DataSource)
    beside = {1: keys, 2: keys.get(str(path[0]), [])}.get(len(path), items.model_fields)
    elsewhere = {key: f"{section}.{key}" for section in keys for key in keys[section]}
    name = str(path[-1])
    return (
        answer_to(name, value)
        or nearest(name, beside, closeness=0.75)
        or nearest(name, elsewhere, elsewhere, closeness=0.9)
    )
