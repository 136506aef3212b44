"""Reading a recipe: files, lines, overrides and relative paths."""

from __future__ import annotations

from pathlib import Path

import pytest

import qlora_train.recipe.schema as recipe_module
from qlora_train import Recipe, load_recipe
from qlora_train.errors import RecipeError
from qlora_train.recipe import DataSource
from qlora_train.recipe.other_trainers import ANSWERS, answer_to


def problems_of(text: str, tmp_path: Path, overrides: tuple[str, ...] = ()) -> list[str]:
    """The problems of a YAML text, with the folder of the file taken off."""
    file = tmp_path / "recipe.yaml"
    file.write_text(text, encoding="utf-8")
    with pytest.raises(RecipeError) as caught:
        load_recipe(file, overrides)
    return [problem.replace(f"{tmp_path}/", "") for problem in caught.value.problems]


def loaded(text: str, tmp_path: Path, overrides: tuple[str, ...] = ()) -> Recipe:
    file = tmp_path / "recipe.yaml"
    file.write_text(text, encoding="utf-8")
    return load_recipe(file, overrides)


TEXT = "model: {base: b}\ndata: {train: t, columns: {prompt: q}}\ntraining: {epochs: 3, seed: 4}\n"


def test_overrides_follow_the_yaml_rules(tmp_path: Path) -> None:
    overrides = (
        "training.learning_rate=1e-5",
        "training.report_to=[wandb]",
        "lora.use_rslora=true",
        'data.prompt_template="{q} = {r}\\n"',
        "data.columns.completion=a",
        "model.revision=abc",
    )
    recipe = loaded(TEXT, tmp_path, overrides)
    assert recipe.training.learning_rate == 1e-5
    assert recipe.training.seed == 4
    assert recipe.training.report_to == ("wandb",)
    assert recipe.lora.use_rslora is True
    assert recipe.data.prompt_template == "{q} = {r}\n"
    assert recipe.data.columns == {"prompt": "q", "completion": "a"}
    assert recipe.model.revision == "abc"


def test_an_override_of_the_length_replaces_the_other_way_to_say_it(tmp_path: Path) -> None:
    training = loaded(TEXT, tmp_path, ("training.max_steps=7",)).training
    assert (training.epochs, training.max_steps) == (None, 7)
    found = problems_of(TEXT, tmp_path, ("training.epochs=1", "training.max_steps=7"))
    assert found == ["override training.max_steps=7: contradicts training.epochs: write one of them"]


def test_problems_of_overrides_name_the_override(tmp_path: Path) -> None:
    overrides = (
        "lora.r=3",
        "training",
        "rank=3",
        "training.seed=[",
        "training.seed=5",
        "training.weight_decay=abc",
        "lora.rank.x=1",
        "memry.vram=auto",
        "model.base=null",
        "training.log_every={a: 1, a: 2}",
    )
    text = TEXT + "lora: {rank: 8}\n"
    assert problems_of(text, tmp_path, overrides) == [
        "override lora.r=3: unknown key; here it is lora.rank",
        "override training: is not section.key=value, such as training.epochs=2",
        "override rank=3: unknown key; did you mean lora.rank?",
        "override training.seed=[: the value is not valid YAML: expected the node content, but found "
        "'<stream end>'",
        "override training.seed=[: overridden twice",
        "override training.weight_decay=abc: must be a number, got 'abc'",
        "override lora.rank.x=1: lora.rank is not a mapping, so it has no keys",
        "override memry.vram=auto: unknown key; did you mean memory?",
        "override model.base=null: must be text, got null",
        "override training.log_every={a: 1, a: 2}: training.log_every.a: duplicate key, written again at "
        "override training.log_every={a: 1, a: 2}",
        "override training.log_every={a: 1, a: 2}: must be a whole number, got a mapping",
    ]


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("model:\n  base: [a\ndata: b\n", "recipe.yaml:3: not valid YAML: "),
        ("model: &m\n  base: *n\n", "recipe.yaml:2: not valid YAML: found undefined alias 'n'"),
        ("- a\n", "recipe.yaml: must be a mapping of sections"),
        ("", "recipe.yaml: model.base: required, and missing"),
        ("model: {base: b}\ndata: 3\n", "recipe.yaml:2: data: must be a mapping of keys, got 3"),
        ("model: {base: b}\ndata: {train: t}\nlora: &l {rank: *l}\n", "recipe.yaml:3: lora.rank"),
        (
            "model: {base: !!python/name:os.system b}\ndata: {train: t}\n",
            "recipe.yaml:1: model.base: is no plain value: could not determine a constructor",
        ),
        *(
            (
                f"model:\n  base: b\ndata: {{train: t}}\nlora:\n  rank: {value}\n",
                "recipe.yaml:5: lora.rank: is no",
            )
            for value in ("!!bool x", "!!int ''", "!!int +", "!!float e", "!!timestamp x", "0x" + "f" * 5000)
        ),
    ],
)
def test_files_that_are_no_recipe(text: str, problem: str, tmp_path: Path) -> None:
    assert problems_of(text, tmp_path)[0].startswith(problem)


def test_files_that_cannot_be_read(tmp_path: Path) -> None:
    (tmp_path / "latin.yaml").write_bytes(b"model: \xff")
    with pytest.raises(RecipeError, match=r"latin\.yaml: cannot be read: 'utf-8' codec"):
        load_recipe(tmp_path / "latin.yaml")
    with pytest.raises(
        RecipeError, match="gsm8k-x: no such recipe file or run folder; .*did you mean gsm8k?"
    ):
        load_recipe("gsm8k-x")


def test_relative_paths(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    beside, here, bundled = tmp_path / "recipes", tmp_path / "here", tmp_path / "bundled"
    for folder, names in ((beside, "ab"), (here, "abc"), (bundled, "abcd")):
        folder.mkdir()
        for name in names:
            (folder / name).touch()
    monkeypatch.chdir(here)
    monkeypatch.setattr(recipe_module, "bundled_recipes_dir", lambda: bundled)
    (bundled / "e.jinja").touch()
    (bundled / "plain").touch()
    text = (
        "model: {base: a, chat_template: e.jinja}\nlora: {init_from: d}\n"
        "data: {train: [b, {path: c}], eval: org/e}\n"
    )
    recipe = loaded(text + "training: {output_dir: a}\n", beside, ("model.base=b",))
    assert recipe.model.base == str(here / "b")  # an override is written where the command runs
    assert recipe.lora.init_from == str(bundled / "d")
    assert recipe.model.chat_template == str(bundled / "e.jinja")
    assert loaded(text, beside, ("model.chat_template=plain",)).model.chat_template == "plain"
    assert [source.path for source in recipe.data.train] == [str(beside / "b"), str(here / "c")]
    assert recipe.data.eval == (DataSource(path="org/e"),)
    assert recipe.training.output_dir == "a"
    assert loaded(text, beside).model.base == str(beside / "a")


def test_settings_of_other_trainers_are_answered_with_ours_at_any_level(tmp_path: Path) -> None:
    text = (
        "model:\n  base: b\n  load_in_4bit: true\ndata:\n  train: t\n  max_seq_length: 512\n"
        "num_train_epochs: 3\nlora: {lora_target_linear: true}\ntraining:\n  bf16: true\n"
    )
    assert problems_of(text, tmp_path, ("training.per_device_train_batch_size=4",)) == [
        "recipe.yaml:3: model.load_in_4bit: unknown key; here it is model.quantization: nf4",
        "recipe.yaml:6: data.max_seq_length: unknown key; here it is data.sequence_length",
        "recipe.yaml:7: num_train_epochs: unknown key; here it is training.epochs",
        "recipe.yaml:8: lora.lora_target_linear: unknown key; here it is lora.target_modules: all-linear",
        "recipe.yaml:10: training.bf16: unknown key; here it is model.compute_dtype: bfloat16",
        "override training.per_device_train_batch_size=4: unknown key; here it is training.micro_batch_size",
    ]


@pytest.mark.parametrize(
    ("setting", "value", "answer"),
    [
        ("load_in_8bit", True, "here it is model.quantization: int8"),
        ("load_in_8bit", False, "not needed here: leave it out"),
        ("load_in_4bit", False, "here it is model.quantization: none (a base in 16 bits, unless load_in_8bit "
         "is true)"),
        ("adapter", "lora", "here it is model.quantization: none (a base in 16 bits, unless load_in_8bit is "
         "true)"),
        ("finetuning_type", "lora", "not needed here: leave it out (every run trains LoRA; without "
         "quantization_bit, set model.quantization: none)"),
        ("pissa_iter", 16, "here it is lora.init_lora_weights (such as pissa_niter_16)"),
        ("token", "hf_x", "leave it out: hf auth login keeps it"),
        ("type", "alpaca", "here it is data.format"),
        ("bf16", "auto", "not needed here: leave it out"),
        ("quantization_bit", 8, "here it is model.quantization: int8"),
        ("peft_use_dora", False, "not needed here: leave it out"),
        ("gradient_checkpointing", False, "not needed here: leave it out"),
        ("dtype", None, "not needed here: leave it out"),
        ("adapter", "qlora", "not needed here: leave it out (every run trains LoRA)"),
        ("finetuning_type", "full", "there is no such setting here: leave it out (every run is supervised"),
        ("bias", "none", "not needed here: leave it out"),
        ("bias", "all", "there is no such setting here"),
        ("train_on_inputs", False, "here it is data.supervise: completions (the default)"),
        ("train_on_inputs", True, "here it is data.supervise: all"),
        ("assistant_only_loss", True, "here it is data.supervise: completions (the default)"),
        ("warmup_steps", 5, "here it is training.warmup_ratio (a share: 5 / steps of the run)"),
        ("saves_per_epoch", 2, "here it is training.save_every (in steps: steps of an epoch / 2)"),
        ("max_samples", 1000, "here it is data.train (with a weight, the share of its rows: [{path: ..., "
         "weight: 1000 / rows}])"),
        ("wandb_project", "x", "here it is training.report_to: [wandb] (and WANDB_PROJECT=x in the "
         "environment)"),
        ("do_train", True, "not needed here: leave it out"),
        ("eval_sample_packing", True, "not needed here: leave it out (data.packing is for evaluation, too)"),
        ("model_type", "LlamaForCausalLM", "not needed here: leave it out (the base says it)"),
    ],
)  # fmt: skip
def test_the_answer_depends_on_the_value_and_says_what_changes_with_the_unit(
    setting: str, value: object, answer: str
) -> None:
    assert answer_to(setting, value).startswith(f"; {answer}")
    if not answer.startswith("there is"):
        assert answer_to(setting, value) == f"; {answer}"


@pytest.mark.parametrize("setting", ["eval_accumulation_steps", "use_qalora", "log_level", "hub_revision"])
def test_no_key_of_elsewhere_is_guessed_by_half_its_letters(setting: str, tmp_path: Path) -> None:
    text = f"model: {{base: b}}\ndata: {{train: t}}\n{setting}: 1\n"
    assert problems_of(text, tmp_path) == [f"recipe.yaml:3: {setting}: unknown key"]


@pytest.mark.parametrize("value", ["none", "null", "[none]"])
def test_without_a_tracker_the_list_is_empty(value: str, tmp_path: Path) -> None:
    text = f"model: {{base: b}}\ndata: {{train: t}}\ntraining: {{report_to: {value}}}\n"
    (problem,) = problems_of(text, tmp_path)
    assert problem == "recipe.yaml:3: training.report_to: for no tracker, leave the key out or write []"


def test_what_is_answered_for_other_trainers_is_a_key_and_a_value_of_the_schema(tmp_path: Path) -> None:
    settings = {name.partition("=")[0] for name in ANSWERS}
    found = {
        answer.removeprefix("here it is ") for answer in ANSWERS.values() if answer.startswith("here it is")
    }
    answers = {answer.partition(" (")[0] for answer in found}
    assert len(settings) > 200 and len(answers) > 50
    sections = {name: field.annotation for name, field in Recipe.model_fields.items()}
    ours = {f"{name}.{key}" for name, section in sections.items() for key in section.model_fields}
    assert {answer.partition(":")[0] for answer in answers} <= ours
    names = {key.partition(".")[2] for key in ours} | set(sections)
    assert not names & settings, "a key of ours is no other trainer's"
    needed = "model: {base: b}\ndata: {train: t}\n"
    for answer in answers:
        key, _, value = answer.partition(": ")
        loaded(needed, tmp_path, (f"{key}={value}",) if value else ())
