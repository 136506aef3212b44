"""Names and orientation of LoRA on the weights of experts in PEFT's files (`target_parameters`).

PEFT adapts a parameter by wrapping the module that holds it; a second parameter of the same module wraps the
first one's wrapper. So tensors are named by nesting, not by parameter:

    mlp.experts.base_layer.lora_A.weight    gate_up_proj (up_proj without gates), if both are trained
    mlp.experts.lora_A.weight               down_proj, or the only one that is trained

Here a parameter is called by its own path, `mlp.experts.gate_up_proj`. For E experts A is [E R, in] and B
[out, R E] (model/expert_lora.py). Up to 0.18, PEFT had them [E R, out] and [in, R E] where the model holds
[E, out, in].
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from qlora_train.errors import BaseModelError
from qlora_train.recipe.module_patterns import last_name, matching_names

_WRAPPED = ".base_layer"


def stored_paths(parameters: Iterable[str]) -> dict[str, str]:
    """Path of each parameter that is trained -> the path before `.lora_A` in PEFT's file."""
    of_module: dict[str, list[str]] = {}
    for path in sorted(parameters, key=lambda path: path.endswith(".down_proj")):  # always held last
        of_module.setdefault(path.rpartition(".")[0], []).append(path)
    return {
        path: module + _WRAPPED * (len(paths) - 1 - place)
        for module, paths in of_module.items()
        for place, path in enumerate(paths)
    }


def parameter_paths(stored: Iterable[str], target_parameters: Any) -> dict[str, str]:
    """The inverse of `stored_paths`, of those stored paths that belong to parameters.

    target_parameters: those of the adapter's config. Raises `BaseModelError` where it is no list of names,
    and where tensors of a parameter are missing: which one the others are is then not known."""
    names = target_parameters or []
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        raise BaseModelError(f"target_parameters must be a list of names, and is {target_parameters!r}.")
    stored = list(stored)
    modules = dict.fromkeys(path.removesuffix(_WRAPPED) for path in stored)
    possible = (f"{module}.{last_name(name)}" for module in modules for name in names)
    wanted = stored_paths({path for path in possible if matching_names(path, names)})
    if missing := [path for path, place in wanted.items() if place not in stored]:
        raise BaseModelError(
            f"target_parameters names {missing[0]}, for which there are no tensors ({wanted[missing[0]]}). "
            "Copy the adapter again, or save it with target_parameters that the model has."
        )
    return {place: path for path, place in wanted.items()}


def refuse_older_orientation(
    path: str, a: Sequence[int], b: Sequence[int], in_features: int, out_features: int
) -> None:
    """Raise `BaseModelError` for shapes of A and B of experts as PEFT 0.18 wrote them."""
    if (a[1], b[0]) == (out_features, in_features) != (in_features, out_features):
        raise BaseModelError(
            f"the adapter's A and B for {path} are {list(a)} and {list(b)}, the orientation in which peft "
            f"trained experts up to 0.18; since 0.19 they are [.., {in_features}] and [{out_features}, ..]. "
            "Merge it into its base with the peft that trained it, and train on the merged model."
        )
