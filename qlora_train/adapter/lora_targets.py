"""Which weights of a base get LoRA parameters, and of which rank and alpha: keys as PEFT reads them.

    layers_to_transform            the layers that are looked at; None: all
    target_modules                 their linears that are chosen
    exclude_modules                of those, the ones that are not
    target_parameters              weights of experts that are chosen too, in all layers; None: none
    rank_pattern, alpha_pattern    ranks and alphas of single modules; the others have `rank` and `alpha`

PEFT passes over a name that no module has, or warns; here it is an error, since a part of the model that was
meant to be trained would stay as it is. Imports no torch: `plan` and `train` both choose here.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass

from qlora_train.adapter.adapter_config import layer_of, within_layer
from qlora_train.errors import BaseModelError
from qlora_train.recipe import LoraSection
from qlora_train.recipe.module_patterns import Names, Number, deciding_key, matching_names


@dataclass(frozen=True)
class LoraTarget:
    """The size of one weight's LoRA parameters, and the alpha that they are scaled by."""

    rank: int
    alpha: float


def choose_targets(
    lora: LoraSection, linears: Iterable[str], experts: Iterable[str] = ()
) -> dict[str, LoraTarget]:
    """The linears that are trained, by module path, in the order of `linears`, then the weights of experts.

    linears: paths of all linears in decoder layers. experts: paths of experts' parameters. Raises
    `BaseModelError` for a key that names nothing, with what there is to name.
    """
    experts = list(experts)
    chosen = choose_paths(lora, linears, experts)
    ranks = _by_pattern("rank_pattern", lora.rank_pattern, lora.rank, chosen, experts)
    alphas = _by_pattern("alpha_pattern", lora.alpha_pattern, lora.alpha, chosen, experts)
    return {path: LoraTarget(ranks[path], alphas[path]) for path in chosen}


def choose_paths(lora: LoraSection, linears: Iterable[str], experts: Iterable[str] = ()) -> list[str]:
    """`choose_targets` without ranks and alphas."""
    experts = list(experts)
    chosen = _in_layers(lora.layers_to_transform, list(linears))
    if lora.target_modules != "all-linear":
        chosen = _named("target_modules", lora.target_modules, chosen, experts) if lora.target_modules else []
    if lora.exclude_modules is not None:
        excluded = set(_named("exclude_modules", lora.exclude_modules, chosen, experts))
        chosen = [path for path in chosen if path not in excluded]
    chosen += _named_parameters(lora.target_parameters or (), experts)
    if not chosen:
        raise BaseModelError(
            "lora.target_modules and exclude_modules leave no linear; nothing would be trained"
        )
    return chosen


def _named_parameters(names: Sequence[str], experts: Sequence[str]) -> list[str]:
    """The experts' parameters that name endings choose."""
    found = {path: matching_names(path, names) for path in experts}
    if idle := [name for name in names if not any(name in matching for matching in found.values())]:
        there = ", ".join(sorted({within_layer(path) for path in experts}))
        raise BaseModelError(
            f"lora.target_parameters: {', '.join(idle)} matches no weight of experts; "
            + (f"there are {there}" if experts else "this model has no experts")
        )
    return [path for path in experts if found[path]]


def coverage(ranks: Mapping[str, int], linears: Collection[str], experts: Collection[str] = ()) -> str:
    """A phrase that says how many linears and weights of experts are trained, with which ranks. ranks: the
    rank of each one that is trained, by path."""
    groups = {"linears": linears, "weights of experts": experts}
    trained = {what: [ranks[path] for path in ranks if path in group] for what, group in groups.items()}
    return "LoRA " + "; ".join(
        _coverage(own, len(groups[what]), what) for what, own in trained.items() if own
    )


def _coverage(ranks: Iterable[int], num_all: int, what: str) -> str:
    counts = sorted(Counter(ranks).items())
    if len(counts) == 1:
        return f"rank {counts[0][0]} on {counts[0][1]} of {num_all} {what}"
    parts = ", ".join(f"rank {rank} on {number}" for rank, number in counts)
    return f"on {sum(number for _, number in counts)} of {num_all} {what}: {parts}"


def _in_layers(layers: Sequence[int] | None, linears: list[str]) -> list[str]:
    if layers is None:
        return linears
    known = {layer_of(path) for path in linears}
    if strange := [str(layer) for layer in layers if layer not in known]:
        raise BaseModelError(
            f"lora.layers_to_transform: {', '.join(strange)} is no layer of this model; it has layers 0 to "
            f"{len(known) - 1}"
        )
    return [path for path in linears if layer_of(path) in layers]


def _named(key: str, names: Names, among: Sequence[str], experts: Iterable[str]) -> list[str]:
    """The paths that name endings or a regular expression choose."""
    if isinstance(names, str):
        hint = f"a text is a regular expression for a whole path such as {among[0]}, name endings are a list"
    else:
        hint = "all-linear takes all" if key == "target_modules" else "no other need be excluded"
    texts = [names] if isinstance(names, str) else names
    found = _matches(key, texts, lambda path: matching_names(path, names), among, experts, hint)
    return [path for path in among if found[path]]


def _by_pattern(
    key: str,
    pattern: Mapping[str, Number],
    usual: Number,
    among: Sequence[str],
    experts: Iterable[str],
) -> dict[str, Number]:
    """The value of every path."""

    def deciding(path: str) -> set[str]:
        first = deciding_key(pattern, path)
        return set() if first is None else {first}

    hint = "where several match a path, the first decides"
    found = _matches(key, list(pattern), deciding, among, experts, hint)
    return {path: next((pattern[text] for text in found[path]), usual) for path in among}


def _matches(
    key: str,
    texts: Sequence[str],
    matching: Callable[[str], set[str]],
    among: Sequence[str],
    experts: Iterable[str],
    hint: str,
) -> dict[str, set[str]]:
    """The texts of a key that match each path. Raises `BaseModelError` for texts that match none. matching:
    returns the texts that match a path."""
    found = {path: matching(path) for path in among}
    if idle := set(texts).difference(*found.values()):
        names_experts = any("experts" in text for text in idle) or any(idle & matching(e) for e in experts)
        raise BaseModelError(
            f"lora.{key}: {', '.join(text for text in texts if text in idle)} matches no linear layer "
            f"{'of this model' if key == 'target_modules' else 'that is trained'}; "
            + ("experts are trained where lora.target_parameters names them; " if names_experts else "")
            + f"there are {', '.join(sorted({within_layer(path) for path in among}))} ({hint})"
        )
    return found
