"""The recipe: every default, every kind of mistake, with its place, all at once."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from ruamel.yaml import YAML

from qlora_train import Recipe, load_recipe
from qlora_train.errors import RecipeError
from qlora_train.recipe import DataSource
from qlora_train.recipe.files import bundled_recipes

MINIMAL = {"model": {"base": "org/base"}, "data": {"train": "org/rows"}}
REPOSITORY = Path(__file__).parent.parent


def with_keys(**keys: Any) -> dict[str, Any]:
    """The minimal recipe with `section__key=value`."""
    values: dict[str, Any] = {name: dict(section) for name, section in MINIMAL.items()}
    for name, value in keys.items():
        section, _, key = name.partition("__")
        values.setdefault(section, {})[key] = value
    return values


def problems_of(text: str, tmp_path: Path, overrides: tuple[str, ...] = ()) -> list[str]:
    """The problems of a YAML text, with the folder of the file taken off."""
    file = tmp_path / "recipe.yaml"
    file.write_text(text, encoding="utf-8")
    with pytest.raises(RecipeError) as caught:
        load_recipe(file, overrides)
    assert caught.value.exit_code == 2
    return [problem.replace(f"{tmp_path}/", "") for problem in caught.value.problems]


def loaded(text: str, tmp_path: Path, overrides: tuple[str, ...] = ()) -> Recipe:
    file = tmp_path / "recipe.yaml"
    file.write_text(text, encoding="utf-8")
    return load_recipe(file, overrides)


def test_defaults_are_those_of_the_contract() -> None:
    values = Recipe.from_dict(MINIMAL).to_dict()
    assert values == {
        "model": {
            "base": "org/base",
            "revision": None,
            "quantization": "nf4",
            "double_quant": True,
            "compute_dtype": "auto",
            "chat_template": None,
            "add_tokens": [],
        },
        "lora": {
            "rank": 16,
            "alpha": 32,
            "dropout": 0.0,
            "target_modules": "all-linear",
            "exclude_modules": None,
            "layers_to_transform": None,
            "rank_pattern": {},
            "alpha_pattern": {},
            "target_parameters": None,
            **dict.fromkeys(("use_rslora", "use_dora", "lora_bias"), False),
            "init_lora_weights": True,
            "init_from": None,
        },
        "data": {
            "train": [{"path": "org/rows", "name": None, "split": None, "weight": 1.0}],
            "eval": None,
            "format": "auto",
            "columns": {},
            "prompt_template": None,
            "supervise": "completions",
            "open_thought": "close",
            "chat_template_kwargs": {},
            "on_bad_row": "stop",
            "too_long": "cut",
            "sequence_length": 2048,
            "packing": True,
        },
        "training": {
            "output_dir": "runs/my-run",
            "seed": 0,
            "epochs": 1.0,
            "max_steps": None,
            "batch_size": 16,
            "micro_batch_size": "auto",
            "gradient_accumulation_steps": None,
            "learning_rate": 2e-4,
            "lora_b_lr_ratio": 1.0,
            "lr_schedule": "cosine",
            "warmup_ratio": 0.03,
            "optimizer": "paged_adamw_8bit",
            "weight_decay": 0.0,
            "max_grad_norm": 1.0,
            "kernels": "auto",
            "deterministic": "auto",
            "log_every": 1,
            **dict.fromkeys(("eval_every", "early_stopping", "samples")),
            "save_every": "auto",
            "keep_checkpoints": 2,
            "report_to": [],
        },
        "memory": {"vram": "auto", "weights": "auto", "activations": "auto"},
    }


@pytest.mark.parametrize(
    "values",
    [
        MINIMAL,
        with_keys(model__quantization="int8", training__max_steps=5, training__learning_rate=1e-5),
        with_keys(data__eval=0.02, data__prompt_template='#: "{mr}"\n\n é {{x}}\t', training__eval_every=2),
        with_keys(data__columns={"prompt": "1e-5", "completion": "null"}, training__output_dir="0x10"),
        with_keys(data__columns={"label": None}, data__on_bad_row="skip", data__too_long="split"),
        with_keys(data__train=[{"path": "a", "weight": 0.5}, {"path": "b", "weight": 2}]),
        with_keys(data__eval=[{"path": "a", "split": "test"}], lora__target_modules=["q_proj", "v_proj"]),
        with_keys(lora__target_modules=r".*\.(q|v)_proj", lora__exclude_modules=["layers.0.mlp.up_proj"]),
        with_keys(lora__layers_to_transform=[1, 2], lora__rank_pattern={r"layers\.1\..*": 4, "q_proj": 2}),
        with_keys(lora__layers_to_transform=3, lora__alpha_pattern={"q_proj": 2, "v_proj": 0.5}),
        with_keys(model__double_quant=False, training__deterministic=True, training__epochs=0.25),
        with_keys(memory__weights="resident", training__report_to=["tensorboard", "wandb"]),
    ],
)
def test_the_resolved_copy_loads_again_to_an_equal_recipe(values: dict[str, Any], tmp_path: Path) -> None:
    recipe = Recipe.from_dict(values)
    assert loaded(recipe.to_yaml(), tmp_path) == recipe
    assert Recipe.from_dict(recipe.to_dict()) == recipe
    assert set(YAML(typ="safe", pure=True).load(recipe.to_yaml())["training"]) == set(
        recipe.to_dict()["training"]
    )


def test_a_recipe_is_frozen() -> None:
    with pytest.raises(ValueError, match="frozen"):
        Recipe.from_dict(MINIMAL).training.seed = 1  # type: ignore[misc]


def test_yaml_1_2_numbers_and_words(tmp_path: Path) -> None:
    text = "model: {base: b, quantization: none}\ndata: {train: t, columns: {text: yes}}\n"
    recipe = loaded(text + "training: {learning_rate: 1e-5, epochs: 2}\nmemory:\n", tmp_path)
    assert recipe.training.learning_rate == 1e-5
    assert recipe.training.epochs == 2.0
    assert recipe.model.quantization == "none" and recipe.model.double_quant is False
    assert recipe.data.columns == {"text": "yes"}
    assert recipe.memory.weights == "auto"  # a section that is null has its defaults


def test_sources_are_always_a_tuple() -> None:
    one = Recipe.from_dict(with_keys(data__train={"path": "a", "split": "dev"})).data.train
    many = Recipe.from_dict(with_keys(data__train=["a", {"path": "b"}], data__eval="c")).data
    assert one == (DataSource(path="a", split="dev"),)
    assert many.train == (DataSource(path="a"), DataSource(path="b"))
    assert many.eval == (DataSource(path="c"),)
    assert Recipe.from_dict(with_keys(data__eval=0.5)).data.eval == 0.5


def test_all_problems_at_once_with_lines_and_suggestions(tmp_path: Path) -> None:
    text = """\
model:
  quantization: nf5
lora:
  rank: 0
  rank: 8
  lerning_rate: 1
data:
  train: [rows, {path: more, splt: dev}]
  sequence_length: 2.5
training:
  learning_rat: 1e-5
  report_to: [tensorbord]
  packing: true
  seed: null
trainig: {}
"""
    assert problems_of(text, tmp_path) == [
        "recipe.yaml:1: model.base: required, and missing",
        "recipe.yaml:2: model.quantization: must be one of nf4, fp4, int8 or none, got 'nf5'; "
        "did you mean nf4?",
        "recipe.yaml:4: lora.rank: duplicate key, written again at recipe.yaml:5",
        "recipe.yaml:4: lora.rank: must be 1 or more, got 0",
        "recipe.yaml:6: lora.lerning_rate: unknown key; did you mean training.learning_rate?",
        "recipe.yaml:8: data.train[1].splt: unknown key; did you mean split?",
        "recipe.yaml:9: data.sequence_length: must be a whole number, got 2.5",
        "recipe.yaml:11: training.learning_rat: unknown key; did you mean learning_rate?",
        "recipe.yaml:12: training.report_to[0]: must be one of tensorboard, wandb, mlflow or trackio, "
        "got 'tensorbord'; did you mean tensorboard?",
        "recipe.yaml:13: training.packing: unknown key; did you mean data.packing?",
        "recipe.yaml:14: training.seed: must be a whole number, got null",
        "recipe.yaml:15: trainig: unknown key; did you mean training?",
    ]


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("model__base", "", "must not be empty"),
        ("model__double_quant", 1, "must be true or false, got 1"),
        ("lora__alpha", True, "must be a number greater than 0, got true"),
        ("lora__dropout", 1.0, "must be less than 1, got 1.0"),
        ("lora__target_modules", "(q|v", "'(q|v' is no regular expression: missing ), unterminated"),
        (
            "lora__target_modules",
            None,
            "must be all-linear, name endings such as [q_proj, v_proj] or a regular",
        ),
        ("lora__target_modules", [], "is empty, and so is target_parameters: nothing would be trained"),
        ("lora__exclude_modules", ["q_proj", 3], "must be a list of module name endings"),
        (
            "lora__layers_to_transform",
            [0, "1"],
            "must be a list of layer numbers such as [0, 1, 2], got a list",
        ),
        ("lora__layers_to_transform", True, "must be a list of layer numbers such as [0, 1, 2], got true"),
        ("lora__rank_pattern", {"q_proj": 0}, "must be 1 or more, got 0"),
        ("lora__rank_pattern", {"*": 4}, "'*' is no regular expression: nothing to repeat"),
        ("lora__alpha_pattern", {"q_proj": "4"}, "must be a number greater than 0, got '4'"),
        ("lora__alpha_pattern", ["q_proj"], "must be a mapping, got a list"),
        ("data__train", [], "names no source"),
        ("data__eval", 0.0, "must be greater than 0, got 0.0"),
        ("data__eval", 1, "must be less than 1, got 1"),
        ("data__columns", "mr", "must be a mapping, got 'mr'"),
        ("data__on_bad_row", "ignore", "must be one of stop or skip, got 'ignore'"),
        ("data__too_long", "trim", "must be one of cut, drop or split, got 'trim'"),
        ("data__train", [{"path": "a", "weight": 0}], "must be greater than 0, got 0"),
        ("data__packing", "yes", "must be true or false, got 'yes'"),
        ("data__sequence_length", 1, "must be 2 or more, got 1"),
        ("training__seed", -1, "must be 0 or more, got -1"),
        ("training__epochs", 0, "must be greater than 0, got 0"),
        ("training__learning_rate", float("nan"), "must be a finite number, got nan"),
        ("training__learning_rate", "1e-4x", "must be a number, got '1e-4x'"),
        ("training__warmup_ratio", 1.5, "must be 1 or less, got 1.5"),
        ("training__warmup_ratio", -0.1, "must be 0 or more, got -0.1"),
        ("training__deterministic", 1, "must be auto, true or false, got 1"),
        ("training__save_every", 0, "must be auto, null or a whole number of 1 or more, got 0"),
        ("training__report_to", "wandb", "must be a list, got 'wandb'"),
        ("memory__vram", 8, "must be auto or a size with its unit, such as 8GiB or 7.5GB, got 8"),
        ("memory__vram", "8", "must be auto or a size with its unit, such as 8GiB or 7.5GB, got '8'"),
        ("memory__vram", "8GiG", "must be auto or a size with its unit, such as 8GiB or 7.5GB, got '8GiG'"),
        ("memory__vram", "-8GiB", "must be auto or a size with its unit, such as 8GiB or 7.5GB, got '-8GiB'"),
        ("memory__vram", "0GiB", "must be more than nothing, got '0GiB'"),
        ("memory__weights", "rma", "must be one of auto, resident, ram or disk, got 'rma'"),
        ("memory__activations", "drop", "must be one of auto, keep, recompute or offload, got 'drop'"),
    ],
)
def test_values_out_of_type_or_range(key: str, value: Any, message: str) -> None:
    with pytest.raises(RecipeError) as caught:
        Recipe.from_dict(with_keys(**{key: value}))
    (problem,) = caught.value.problems
    assert problem.startswith(f"recipe: {key.replace('__', '.')}")
    assert f": {message}" in problem


@pytest.mark.parametrize(
    ("keys", "problem"),
    [
        (
            {"model__quantization": "int8", "model__double_quant": True},
            "model.double_quant: only for nf4 and fp4, and quantization is int8; remove it or write null",
        ),
        (
            {"model__quantization": "none", "model__double_quant": False},
            "model.double_quant: only for nf4 and fp4, and quantization is none; remove it or write null",
        ),
        (
            {"model__base": "/models/llama", "model__revision": "main"},
            "model.revision: names a revision on the hub, but base is a local folder; remove it",
        ),
        (
            {"training__epochs": 1, "training__max_steps": 10},
            "training.max_steps: contradicts training.epochs: write one of them",
        ),
        (
            {"training__epochs": None},
            "training.epochs: epochs and max_steps are both null: write one of them",
        ),
        (
            {"training__eval_every": 5},
            "training.eval_every: there is nothing to evaluate: write data.eval too",
        ),
        (
            {"data__prompt_template": "{q}", "data__format": "text"},
            "data.prompt_template: only for format prompt_completion, and format is text",
        ),
        (
            {"data__columns": {"promt": "q"}, "data__format": "prompt_completion"},
            "data.columns.promt: format prompt_completion has prompt, completion, label; "
            "did you mean prompt?",
        ),
        (
            {"data__columns": {"prompt": None}},
            "data.columns.prompt: null (not read) is only for roles that are optional",
        ),
        (
            {"data__eval": [{"path": "a", "weight": 2.0}]},
            "data.eval[0].weight: weights are for training; evaluation sees each row once",
        ),
        (
            {"data__prompt_template": "Hi"},
            'data.prompt_template: names no column; write it like "Describe: {mr}\\n"',
        ),
        (
            {"data__prompt_template": "{} {a.b} {c!r} {d:>3}"},
            [
                f"data.prompt_template: {{{x}}} is not a plain column name such as {{question}}"
                for x in ("", "a.b", "c", "d")
            ],
        ),
        (
            {"data__prompt_template": "{q"},
            "data.prompt_template: not a template (expected '}' before end of string); "
            "a brace that is text is written twice: {{ or }}",
        ),
    ],
)
def test_contradictions(keys: dict[str, Any], problem: str | list[str]) -> None:
    with pytest.raises(RecipeError) as caught:
        Recipe.from_dict(with_keys(**keys))
    expected = [problem] if isinstance(problem, str) else problem
    assert list(caught.value.problems) == [f"recipe: {text}" for text in expected]


@pytest.mark.parametrize(
    ("text", "num_bytes"),
    [
        ("8GiB", 8 * 2**30),
        ("7.5 GB", 7_500_000_000),
        ("900mib", 900 * 2**20),
        ("1TB", 10**12),
        ("2048 b", 2048),
        ("auto", None),
    ],
)
def test_a_budget_is_a_size_with_its_unit(text: str, num_bytes: int | None) -> None:
    recipe = Recipe.from_dict(with_keys(memory__vram=text))
    assert recipe.memory.vram_bytes == num_bytes
    assert Recipe.from_dict(recipe.to_dict()) == recipe


def test_null_takes_a_contradicting_key_back() -> None:
    recipe = Recipe.from_dict(with_keys(model__quantization="int8", model__double_quant=None))
    assert recipe.model.double_quant is False
    recipe = Recipe.from_dict(with_keys(training__epochs=None, training__max_steps=3))
    assert (recipe.training.epochs, recipe.training.max_steps) == (None, 3)


def test_a_prompt_template_decides_format_auto() -> None:
    recipe = Recipe.from_dict(with_keys(data__prompt_template="Describe: {customer rating}\n"))
    assert recipe.data.format == "prompt_completion"


def test_every_recipe_in_the_repository_loads() -> None:
    files = sorted((REPOSITORY / "recipes").rglob("*.yaml"))
    assert set(bundled_recipes().values()) == set(files)  # each has a name
    for file in files:
        assert load_recipe(file).training.output_dir.startswith("runs/"), file
        assert file.read_text(encoding="utf-8").startswith("# "), f"{file}: the first line says what it is"


def test_a_bundled_recipe_loads_by_its_name_and_a_folder_by_its_recipe(tmp_path: Path) -> None:
    assert load_recipe("gsm8k") == load_recipe(REPOSITORY / "recipes" / "gsm8k.yaml")
    (tmp_path / "recipe.yaml").write_text("model: {base: b}\ndata: {train: t}\n", encoding="utf-8")
    assert load_recipe(tmp_path) == load_recipe(tmp_path / "recipe.yaml")


def test_paths_are_as_a_shell_takes_them(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    values = {
        "model": {"base": "~/base"},
        "data": {"train": "~/rows.jsonl"},
        "training": {"output_dir": "~/run"},
    }
    recipe = Recipe.from_dict(values)
    found = (recipe.model.base, recipe.data.train[0].path, recipe.training.output_dir)
    assert found == tuple(str(tmp_path / name) for name in ("base", "rows.jsonl", "run"))


@pytest.mark.parametrize("path", ["~nosuchuser/x", "a\0b", "a\udcffb"])
@pytest.mark.parametrize("key", ["model.base", "data.train", "lora.init_from", "training.output_dir"])
def test_paths_that_no_system_takes(key: str, path: str) -> None:
    section, name = key.split(".")
    values: dict[str, dict[str, str]] = {"model": {"base": "x"}, "data": {"train": "y"}}
    values.setdefault(section, {})[name] = path
    with pytest.raises(RecipeError, match=key):
        Recipe.from_dict(values)


def test_json_writes_wide_characters_as_two_escapes(tmp_path: Path) -> None:
    file = tmp_path / "r.yaml"
    values = {"model": {"base": "x"}, "data": {"train": "y"}, "training": {"output_dir": "ü日本/🦙"}}
    file.write_text(json.dumps(values), encoding="ascii")
    assert load_recipe(file).training.output_dir == "ü日本/🦙"
    file.write_text('{"model": {"base": "\\udcff"}}', encoding="ascii")
    with pytest.raises(RecipeError, match="half a character"):
        load_recipe(file)
