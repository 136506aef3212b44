"""Which tensors of a checkpoint make up a parameter, and in what order.

On disk a mixture of experts is often one tensor per expert and projection (`experts.7.gate_proj.weight`,
`block_sparse_moe.experts.7.w1.weight`), while transformers holds one parameter for all of them. Its own
tables (`conversion_mapping`) say which names belong to which parameter; they are read here, so a family needs
no code. What is understood of them: names that are renamed, and experts that are gathered row by row,

    gate_up[e] = rows of gate_e, then rows of up_e          down[e] = rows of down_e

Any other conversion of a weight is refused by name.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from transformers import PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import (
    Concatenate,
    MergeModulelist,
    WeightConverter,
    WeightRenaming,
    rename_source_key,
)

from qlora_train.errors import BaseModelError, UnsupportedModelError


@dataclass(frozen=True)
class RowPart:
    """Rows of a layer's weight. layer, weight: whose. start, stop: which rows of it."""

    layer: int
    weight: str
    start: int
    stop: int


def tensors_of(
    model: PreTrainedModel, parameters: Iterable[str], names: Iterable[str]
) -> dict[str, tuple[str, ...]]:
    """Parameter -> the tensors of the checkpoint whose rows, one after another, are its rows.

    model: one of the family, without weights. parameters: all names that it calls for. names: the names of
    the checkpoint's tensors. A parameter that has none is left out; so are tensors of other parts of the
    model (vision). Raises `UnsupportedModelError` for a conversion that is no gathering of rows.
    """
    transforms = get_model_conversion_mapping(model)
    renamings = [t for t in transforms if isinstance(t, WeightRenaming)]
    converters = [t for t in transforms if isinstance(t, WeightConverter)]
    wanted = dict.fromkeys(parameters, True)
    by_place: dict[str, dict[tuple[int, int], str]] = defaultdict(dict)
    for name in names:
        for known_as in dict.fromkeys((name, _without_wrapper(name))):
            parameter, pattern = rename_source_key(
                known_as, renamings, converters, model.base_model_prefix, meta_state_dict=wanted
            )
            if parameter in wanted:
                break
        else:
            continue
        place = (0, 0) if pattern is None else _place(name, pattern, _gathering(converters, pattern, name))
        if place in by_place[parameter]:
            other = by_place[parameter][place]
            raise BaseModelError(f"{other} and {name}: two tensors of the checkpoint stand for {parameter}")
        by_place[parameter][place] = name
    return {name: tuple(tensors[place] for place in sorted(tensors)) for name, tensors in by_place.items()}


def _without_wrapper(name: str) -> str:
    """The name that a tensor of a text tower would have in a checkpoint of the text model alone."""
    return re.sub(r"(^|\.)language_model\.", r"\1", name, count=1)


def _gathering(converters: Iterable[WeightConverter], pattern: str, name: str) -> WeightConverter:
    """The converter that a tensor goes through, which gathers rows."""
    converter = next(c for c in converters if pattern in c.source_patterns)
    kinds = [(type(operation), getattr(operation, "dim", None)) for operation in converter.operations]
    if kinds not in ([(MergeModulelist, 0)], [(MergeModulelist, 0), (Concatenate, 1)]):
        operations = ", ".join(type(operation).__name__ for operation in converter.operations)
        raise UnsupportedModelError(
            f"{name}: transformers loads it through {operations}, which qlora_train does not do. Use a "
            "checkpoint that has it in another form."
        )
    return converter


def _place(name: str, pattern: str, converter: WeightConverter) -> tuple[int, int]:
    """(expert, which of its matrices) of a tensor."""
    parts = "(\\d+)".join(re.escape(part) for part in pattern.replace("\\.", ".").split("*"))
    match = re.search(parts, name) or re.search(r"experts\.(\d+)\.", name)
    if match is None:
        raise UnsupportedModelError(f"{name}: no expert's number is found in this name ({pattern})")
    return int(match.group(1)), converter.source_patterns.index(pattern)


def row_parts(
    layer: int, weight: str, tensors: tuple[str, ...], num_rows: Mapping[str, int]
) -> dict[str, RowPart]:
    """Tensor -> which rows of the weight it holds. num_rows: the number of rows of every tensor."""
    parts, start = {}, 0
    for name in tensors:
        parts[name] = RowPart(layer, weight, start, start + num_rows[name])
        start += num_rows[name]
    return parts
