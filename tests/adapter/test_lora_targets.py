"""Which linears are trained, with which rank and alpha: PEFT's own choice, and errors where it is silent."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from tiny_models import random_model, tiny_config

from qlora_train.adapter.adapter_config import CONFIG_FILE, AdapterConfig, name_parameters, name_targets
from qlora_train.adapter.adapter_files import save_adapter
from qlora_train.adapter.continued_adapter import as_continued
from qlora_train.adapter.lora_targets import LoraTarget, choose_paths, choose_targets, coverage
from qlora_train.errors import BaseModelError, RecipeError
from qlora_train.model.base import adaptable_names
from qlora_train.recipe import LoraSection, Recipe

LINEARS = adaptable_names(tiny_config("llama-tied"))[0]
EXPERTS = [f"model.layers.{i}.mlp.experts.{name}" for i in range(3) for name in ("gate_up_proj", "down_proj")]
CHOICES: dict[str, dict[str, Any]] = {
    "endings": {"target_modules": ["q_proj", "mlp.up_proj"]},
    "whole paths": {"target_modules": ["model.layers.1.self_attn.q_proj", "layers.0.mlp.down_proj"]},
    "expression": {"target_modules": r"model\.layers\.[02]\.self_attn\.(q|v)_proj"},
    "excluded endings": {
        "target_modules": ["q_proj", "up_proj"],
        "exclude_modules": ["layers.1.mlp.up_proj"],
    },
    "excluded expression": {
        "target_modules": r".*_proj",
        "exclude_modules": r".*\.layers\.2\..*|.*down_proj",
    },
    "all but some": {
        "target_modules": "all-linear",
        "exclude_modules": ["down_proj", "layers.0.self_attn.q_proj"],
    },
    "layers": {"target_modules": ["q_proj", "up_proj"], "layers_to_transform": [2, 0]},
    "one layer": {"target_modules": ["q_proj", "up_proj"], "layers_to_transform": 1},
    "patterns": {
        "target_modules": ["q_proj", "k_proj", "up_proj"],
        "rank_pattern": {r"layers\.1\..*": 2, "q_proj": 8, r"^model\.layers\.0\.mlp\.up_proj": 3},
        "alpha_pattern": {"mlp.up_proj": 1, "(q|k)_proj": 0.5},
    },
    "rank stabilized": {
        "target_modules": ["q_proj", "v_proj"],
        "rank_pattern": {"v_proj": 9},
        "alpha_pattern": {"q_proj": 5},
        "use_rslora": True,
    },
}


def lora_section(**keys: Any) -> LoraSection:
    """Through every check of a recipe, and from its resolved copy."""
    recipe = Recipe.from_dict({"model": {"base": "b"}, "data": {"train": "t"}, "lora": keys})
    assert Recipe.from_dict(recipe.to_dict()) == recipe
    return recipe.lora


@pytest.mark.parametrize("name", CHOICES)
def test_the_choice_is_pefts(name: str) -> None:
    keys = {"alpha": 6, "rank": 4} | CHOICES[name]
    lora = lora_section(**keys)
    config = peft.LoraConfig(r=keys.pop("rank"), lora_alpha=keys.pop("alpha"), **keys, task_type="CAUSAL_LM")
    model = peft.get_peft_model(random_model(tiny_config("llama-tied")), config)
    theirs = {
        path.removeprefix("base_model.model."): (module.r["default"], module.scaling["default"])
        for path, module in model.named_modules()
        if hasattr(module, "lora_A")
    }
    chosen = choose_targets(lora, LINEARS, EXPERTS)
    ours = AdapterConfig(
        "b", lora.rank, lora.alpha, use_rslora=lora.use_rslora,
        rank_pattern={path: target.rank for path, target in chosen.items()},
        alpha_pattern={path: target.alpha for path, target in chosen.items()},
    )  # fmt: skip
    assert {path: (ours.rank_of(path), ours.scaling_of(path)) for path in chosen} == theirs
    assert list(chosen) == [path for path in LINEARS if path in chosen]


def test_all_linear_takes_exclusions_and_layers() -> None:
    assert choose_paths(lora_section(), LINEARS) == LINEARS
    lora = lora_section(exclude_modules=["down_proj"], layers_to_transform=[1])
    expected = [path for path in LINEARS if ".layers.1." in path and not path.endswith("down_proj")]
    assert choose_paths(lora, LINEARS) == expected


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        (
            {"target_modules": ["q_proj", "p_proj", "proj"]},
            "lora.target_modules: p_proj, proj matches no linear layer of this model; there are "
            "mlp.down_proj, mlp.gate_proj, mlp.up_proj, self_attn.k_proj",
        ),
        (
            {"target_modules": "q_proj"},
            "q_proj matches no linear layer of this model; there are mlp.down_proj",
        ),
        (
            {"target_modules": "q_proj"},
            "a text is a regular expression for a whole path such as model.layers.0.",
        ),
        (
            {"target_modules": ["q_proj"], "exclude_modules": ["lm_head"]},
            "exclude_modules: lm_head matches no linear layer that is trained; there are self_attn.q_proj",
        ),
        ({"target_modules": ["q_proj"], "exclude_modules": ".*"}, "nothing would be trained"),
        (
            {"layers_to_transform": [2, 3, 4]},
            "lora.layers_to_transform: 3, 4 is no layer of this model; it has",
        ),
        (
            {"target_modules": ["q_proj"], "rank_pattern": {"q_proj": 2, "up_proj": 3}},
            "lora.rank_pattern: up_proj matches no linear layer that is trained; there are self_attn.q_proj",
        ),
        (
            {"alpha_pattern": {".*": 2, "up_proj": 3}},
            "lora.alpha_pattern: up_proj matches no linear layer that is trained",
        ),
        ({"target_modules": ["experts.gate_up_proj"]}, "trained where lora.target_parameters names them"),
        ({"target_modules": r".*\.gate_up_proj"}, "trained where lora.target_parameters names them"),
        ({"rank_pattern": {r"experts\.down_proj": 8}}, "trained where lora.target_parameters names them"),
        (
            {"target_parameters": ["experts.down_proj", "experts.up_proj", "up_proj"]},
            "lora.target_parameters: experts.up_proj, up_proj matches no weight of experts; there are "
            "mlp.experts.down_proj, mlp.experts.gate_up_proj",
        ),
    ],
)
def test_what_names_nothing_is_an_error_that_lists_what_there_is(keys: dict[str, Any], message: str) -> None:
    with pytest.raises(BaseModelError, match=re.escape(message)):
        choose_targets(lora_section(**keys), LINEARS, EXPERTS)


def test_weights_of_experts_are_chosen_besides(tmp_path: Path) -> None:
    """In all layers, or in those that a name says, with ranks and alphas of their own; alone too. An adapter
    of each choice is continued."""
    for number, (keys, experts, ranks) in enumerate(
        [
            ({"target_parameters": ["mlp.experts.gate_up_proj", "experts.down_proj"]}, EXPERTS, {4}),
            ({"target_parameters": ["down_proj"], "layers_to_transform": [1]}, EXPERTS[1::2], {4}),
            (
                {"target_modules": [], "target_parameters": ["layers.1.mlp.experts.down_proj"]},
                EXPERTS[3:4],
                {4},
            ),
            (
                {
                    "target_parameters": ["down_proj", "gate_up_proj"],
                    "rank_pattern": {r"experts\.down_proj": 2},
                },
                EXPERTS,
                {4, 2},
            ),
        ]
    ):
        lora = lora_section(rank=4, **keys)
        chosen = choose_targets(lora, LINEARS, EXPERTS)
        without = lora.model_copy(update={"target_parameters": None})
        linears = choose_paths(without, LINEARS) if lora.target_modules else []
        assert list(chosen) == linears + experts
        assert {chosen[path].rank for path in experts} == ranks
        config = AdapterConfig(
            "b", 4, 32, target_modules=name_targets(linears, LINEARS)[0],
            rank_pattern={path: target.rank for path, target in chosen.items()},
            target_parameters=name_parameters(experts, EXPERTS),
        )  # fmt: skip
        rows = {path: target.rank * (6 if path in experts else 1) for path, target in chosen.items()}
        folder = tmp_path / str(number)
        save_adapter(folder, config, {path: (torch.ones(n, 8), torch.ones(8, n)) for path, n in rows.items()})
        for section in (LoraSection(), lora):
            section = section.model_copy(update={"init_from": str(folder)})
            continued = as_continued(section, LINEARS, EXPERTS)
            assert choose_targets(continued, LINEARS, EXPERTS) == chosen
            assert as_continued(continued, LINEARS, EXPERTS) == continued
        with pytest.raises(BaseModelError, match=r"lora\.dropout: must be 0 with target_parameters"):
            as_continued(lora_section(init_from=str(folder), dropout=0.1), LINEARS, EXPERTS)
        with pytest.raises(BaseModelError, match="which this base does not have"):
            as_continued(lora_section(init_from=str(folder)), LINEARS)


def test_a_model_without_experts_has_no_parameters_to_name() -> None:
    with pytest.raises(
        BaseModelError, match="down_proj matches no weight of experts; this model has no expe"
    ):
        choose_targets(lora_section(target_parameters=["down_proj"]), LINEARS)


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"dropout": 0.1}, r"lora\.dropout: must be 0 with target_parameters"),
        ({"use_dora": True}, r"lora\.use_dora: is for linears, and PEFT refuses it with target_parameters"),
        ({"target_parameters": "down_proj"}, r"lora\.target_parameters: must be a list"),
        ({"target_parameters": [""]}, r"lora\.target_parameters"),
        (
            {"target_parameters": [], "target_modules": []},
            "so is target_parameters: nothing would be trained",
        ),
    ],
)
def test_what_does_not_go_with_experts(keys: dict[str, Any], message: str) -> None:
    with pytest.raises(RecipeError, match=message):
        lora_section(**{"target_parameters": ["down_proj"]} | keys)


def test_experts_are_spoken_of_where_they_are_meant() -> None:
    with pytest.raises(BaseModelError) as caught:
        choose_targets(lora_section(target_modules=["p_proj"]), LINEARS, EXPERTS)
    assert "experts" not in str(caught.value)
    shared = [*LINEARS, "model.layers.0.mlp.shared_expert.down_proj"]  # beside experts' down_proj
    assert shared[-1] in choose_targets(lora_section(target_modules=["down_proj"]), shared, EXPERTS)


def test_layers_beside_an_expression_are_a_contradiction() -> None:
    with pytest.raises(RecipeError, match=r"lora\.layers_to_transform: only beside all-linear or a list"):
        lora_section(target_modules=r".*q_proj", layers_to_transform=[1])


def test_dropout_beside_dora_is_a_contradiction() -> None:
    with pytest.raises(RecipeError, match=r"lora\.dropout: must be 0 with use_dora, which scales the base's"):
        lora_section(use_dora=True, dropout=0.05)
    assert lora_section(use_dora=True, use_rslora=True).use_dora
    with pytest.raises(RecipeError, match=r"lora\.lora_bias: must be false with use_dora"):
        lora_section(use_dora=True, lora_bias=True)


def test_coverage_in_words() -> None:
    assert coverage(dict.fromkeys(LINEARS[:14], 8), LINEARS) == "LoRA rank 8 on 14 of 21 linears"
    mixed = dict(zip(LINEARS, [8, 4, 8, 16], strict=False))
    said = "LoRA on 4 of 21 linears: rank 4 on 1, rank 8 on 2, rank 16 on 1"
    assert coverage(mixed, LINEARS, EXPERTS) == said
    assert (
        coverage(mixed | {EXPERTS[0]: 2}, LINEARS, EXPERTS) == f"{said}; rank 2 on 1 of 6 weights of experts"
    )
    assert coverage({EXPERTS[0]: 2}, LINEARS, EXPERTS) == "LoRA rank 2 on 1 of 6 weights of experts"


@pytest.mark.parametrize("name", CHOICES)
def test_an_adapter_of_every_choice_is_continued(tmp_path: Path, name: str) -> None:
    """Written and read again it says the same modules, ranks and alphas, whether the recipe repeats them or
    leaves them out."""
    lora = lora_section(rank=4, alpha=6, **CHOICES[name])
    chosen = choose_targets(lora, LINEARS)
    names, layers = name_targets(chosen, LINEARS)
    config = AdapterConfig(
        "b", lora.rank, lora.alpha, target_modules=names, use_rslora=lora.use_rslora,
        rank_pattern={path: target.rank for path, target in chosen.items()},
        alpha_pattern={path: target.alpha for path, target in chosen.items()},
        layers=layers,
    )  # fmt: skip
    factors = {path: (torch.ones(t.rank, 8), torch.ones(8, t.rank)) for path, t in chosen.items()}
    save_adapter(tmp_path, config, factors)
    for section in (LoraSection(), lora):
        continued = as_continued(section.model_copy(update={"init_from": str(tmp_path)}), LINEARS)
        assert choose_targets(continued, LINEARS) == chosen
        assert (continued.rank, continued.alpha, continued.use_rslora) == (4, 6, lora.use_rslora)
        assert as_continued(continued, LINEARS) == continued  # a resume reads it resolved


def test_an_adapter_with_dora_is_continued_without_dropout(tmp_path: Path) -> None:
    config = AdapterConfig("b", 4, 8, target_modules=["q_proj"], use_dora=True)
    tensors = (torch.ones(4, 8), torch.ones(8, 4), torch.ones(8))
    save_adapter(tmp_path, config, {path: tensors for path in LINEARS if path.endswith("q_proj")})
    continued = {"init_from": str(tmp_path)}
    assert as_continued(lora_section(**continued), LINEARS).use_dora
    with pytest.raises(BaseModelError, match="dropout: must be 0 with"):
        as_continued(lora_section(**continued, dropout=0.1), LINEARS)
    with pytest.raises(BaseModelError, match="another use_dora"):
        as_continued(lora_section(**continued, use_dora=False), LINEARS)


def test_a_recipe_that_says_other_ranks_than_the_adapter_is_refused(tmp_path: Path) -> None:
    path = LINEARS[0]
    config = AdapterConfig("b", 4, 8, target_modules=[path], rank_pattern={path: 2})
    save_adapter(tmp_path, config, {path: (torch.ones(2, 8), torch.ones(8, 2))})
    keys = {"init_from": str(tmp_path), "rank_pattern": {"q_proj": 3}}
    with pytest.raises(
        BaseModelError, match=rf"give {re.escape(path)} rank 3 and alpha 8, the adapter .* rank 2"
    ):
        as_continued(lora_section(**keys), LINEARS)
    with pytest.raises(BaseModelError, match="differs from the modules of lora.init_from in 6 modules"):
        as_continued(lora_section(init_from=str(tmp_path), layers_to_transform=[0]), LINEARS)


def test_patterns_in_the_file_are_short(tmp_path: Path) -> None:
    """By name where all modules of a name are alike: PEFT compiles every key for every module."""
    ranks = {path: 2 if "mlp" in path else 8 if "layers.1" in path else 4 for path in LINEARS}
    config = AdapterConfig("b", 4, 8, target_modules=["x"], rank_pattern=ranks)
    save_adapter(tmp_path, config, {p: (torch.ones(r, 8), torch.ones(8, r)) for p, r in ranks.items()})
    pattern = json.loads((tmp_path / CONFIG_FILE).read_text())["rank_pattern"]
    of_layer_1 = {re.escape(p): 8 for p in LINEARS if "layers.1.self_attn" in p}
    assert pattern == {"gate_proj": 2, "up_proj": 2, "down_proj": 2} | of_layer_1


def test_chosen_targets_have_sizes() -> None:
    lora = lora_section(rank=4, alpha=6, target_modules=["q_proj"], rank_pattern={r"layers\.1\..*": 2})
    assert list(choose_targets(lora, LINEARS).values()) == [
        LoraTarget(4, 6),
        LoraTarget(2, 6),
        LoraTarget(4, 6),
    ]
