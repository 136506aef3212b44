"""Checks across keys of a recipe: contradictions, and defaults that depend on another key.

Both look at **written** values, before defaults: `quantization: int8` is valid, but not together with
`double_quant: true`. Values of a wrong type are left to the type check.
"""

from __future__ import annotations

import os
import re
import string
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from pydantic import ByteSize, TypeAdapter

from qlora_train.recipe.module_patterns import expression
from qlora_train.recipe.yaml_file import KeyPath, nearest, show

FOUR_BIT = ("nf4", "fp4")
COLUMN_ROLES = {
    "messages": ("messages", "prompt", "completion", "system", "tools", "functions", "label"),
    "sharegpt": ("conversations", "system", "tools", "functions", "label"),
    "alpaca": ("instruction", "input", "output", "system", "history", "tools", "functions", "label"),
    "prompt_completion": ("prompt", "completion", "label"),
    "text": ("text",),
}
"""The keys that `data.columns` may have, by format: the roles that columns are mapped to."""
OPTIONAL_ROLES = frozenset({"input", "system", "history", "tools", "functions", "label"})
"""Roles that a table may lack; mapped to null, they are not read."""

MESSAGES = {
    "missing": "required, and missing",
    "int_type": "must be a whole number",
    "float_type": "must be a number",
    "finite_number": "must be a finite number",
    "bool_type": "must be true or false",
    "string_type": "must be text",
    "tuple_type": "must be a list",
    "dict_type": "must be a mapping",
    "model_type": "must be a mapping of keys",
    "string_too_short": "must not be empty",
    "too_short": "must not be empty",
    "greater_than": "must be greater than {gt:g}",
    "greater_than_equal": "must be {ge:,.12g} or more",
    "less_than": "must be less than {lt:g}",
    "less_than_equal": "must be {le:,.12g} or less",
    "literal_error": "must be one of {expected}",
    "value_error": "{error}",
}
"""What a value must be, by the type of pydantic's error."""

DEFAULT_BATCH_SIZE = 16
MOST_BINS, MOST_TOKENS = 2**20, 2**22
"""The most bins of a step, and tokens of a sequence or micro-batch: beyond any machine, but still planned."""
_SIZE = re.compile(r"\s*\d{1,99}(\.\d+)?\s*([kmgt]i?)?b\s*", re.IGNORECASE)


def parse_size(text: Any) -> int:
    """The bytes of a size such as 8GiB or "7.5 GB"; GB is 1000^3 bytes, GiB 1024^3. Raises ValueError for
    anything else."""
    if not isinstance(text, str) or not _SIZE.fullmatch(text):  # ByteSize takes 8, 8G and 8Gbit, too
        raise ValueError(f"must be auto or a size with its unit, such as 8GiB or 7.5GB, got {text!r}")
    num_bytes = int(TypeAdapter(ByteSize).validate_python(text))
    if num_bytes < 1:
        raise ValueError(f"must be more than nothing, got {text!r}")
    return num_bytes


def nameable(text: str) -> str:
    """The text, if the system can take it as a file name. Raises ValueError otherwise."""
    if "\0" in text:
        raise ValueError("holds a NUL character, which no path can")
    try:
        os.fsencode(text)
    except UnicodeEncodeError as error:
        raise ValueError(
            f"holds {ascii(error.object[error.start])}, which this locale ({error.encoding}) has no bytes "
            "for; start with the environment variable PYTHONUTF8=1"
        ) from error
    return text


def expanded(text: str) -> str:
    """The path with `~` expanded to the home folder, as by a shell."""
    try:
        return str(Path(text).expanduser()) if text.startswith("~") else text
    except RuntimeError as error:  # ~nosuchuser
        raise ValueError(f"no home folder is known for {show(text)}; write the whole path") from error


def as_sources(value: Any) -> Any:
    """`path`, `{path: ...}` or a list of either, as a list of `{path: ...}`."""
    items = value if isinstance(value, list | tuple) else [value]
    return [{"path": item} if isinstance(item, str) else item for item in items]


def as_alpha(value: Any) -> Any:
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < float("inf"):
        raise ValueError(f"must be a number greater than 0, got {show(value)}")
    return value


def as_targets(value: Any) -> Any:
    """Of `lora.target_modules`; an empty list: no linear, experts alone."""
    if value is None:
        raise ValueError("must be all-linear, name endings such as [q_proj, v_proj] or a regular expression")
    return () if isinstance(value, list | tuple) and not value else as_names(value)


def as_names(value: Any) -> Any:
    """Modules by a list of name endings or by a regular expression; None: not said."""
    if isinstance(value, str) and value:
        expression(value)
        return value
    if value is None:
        return None
    if not isinstance(value, list | tuple) or not value or not all(isinstance(v, str) and v for v in value):
        raise ValueError(
            "must be a list of module name endings such as [q_proj, v_proj], or a regular expression, got "
            + show(value)
        )
    return tuple(value)


def as_tokens(value: Any) -> Any:
    """Of `model.add_tokens`: texts stand for `{token: text}`."""
    if not isinstance(value, list | tuple):
        return value
    return [{"token": item} if isinstance(item, str) else item for item in value]


def as_trackers(value: Any) -> Any:
    """Of `training.report_to`."""
    if value in (None, "none", ["none"]):
        raise ValueError("for no tracker, leave the key out or write []")
    return value


def not_blank(text: str) -> str:
    if not text.strip():
        raise ValueError("is nothing but white space")
    return text


def all_different(tokens: Any) -> Any:
    texts = [token.token for token in tokens]
    if repeated := sorted({text for text in texts if texts.count(text) > 1}):
        raise ValueError(f"names {', '.join(repeated)} twice")
    return tokens


def as_layers(value: Any) -> Any:
    """Layers by a list of their numbers, or by one number."""
    numbers = value if isinstance(value, list | tuple) else [value]
    if value is None or (numbers and all(type(number) is int and number >= 0 for number in numbers)):
        return value if value is None else tuple(numbers)
    raise ValueError(f"must be a list of layer numbers such as [0, 1, 2], got {show(value)}")


def as_pattern(value: Any) -> Any:
    for key in value if isinstance(value, dict) else ():
        expression(str(key), is_key=True)
    return value


def as_prompts(value: Any) -> Any:
    """Of `training.samples.prompts`."""
    if isinstance(value, list | tuple) and value and all(map(_is_prompt, value)):
        return tuple(value)
    raise ValueError(
        "must be a list of texts, or of conversations to be answered such as [{role: user, content: Hello}], "
        f"got {show(value)}"
    )


def _is_prompt(value: Any) -> bool:
    if not isinstance(value, list) or not value:
        return isinstance(value, str) and bool(value)
    keys = ("role", "content")
    are_messages = all(isinstance(m, dict) and [*map(type, map(m.get, keys))] == [str, str] for m in value)
    return are_messages and all(len(m) == 2 for m in value) and value[-1]["role"] != "assistant"


def as_initialisation(value: Any) -> Any:
    """Of `lora.init_lora_weights`, in PEFT's words."""
    if value is not True and not (isinstance(value, str) and re.fullmatch(r"pissa(_niter_\d{1,3})?", value)):
        raise ValueError(
            "must be true (B is zero), pissa, or pissa_niter_16 for a faster decomposition in 16 iterations, "
            f"got {show(value)}"
        )
    return value


def auto_or_count(value: Any) -> Any:
    if value is not None and value != "auto" and not _is_count(value):
        raise ValueError(f"must be auto, null or a whole number of 1 or more, got {show(value)}")
    return value


def auto_or_bins(value: Any) -> Any:
    if value != "auto" and not (_is_count(value) and value <= MOST_BINS):
        raise ValueError(f"must be auto or a whole number from 1 to {MOST_BINS:,}, got {show(value)}")
    return value


def _is_count(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 1


def _sections(values: Mapping[str, Any], *names: str) -> list[dict[str, Any]]:
    """Copies of sections; one that is no mapping becomes empty (the type check reports it)."""
    return [dict(values[name]) if isinstance(values[name], dict) else {} for name in names]


def with_dependent_defaults(values: Mapping[str, Any]) -> dict[str, Any]:
    """The values, filled with the defaults that depend on another key."""
    model, data, training = _sections(values, "model", "data", "training")
    if model.get("double_quant") is None:
        model["double_quant"] = model.get("quantization", "nf4") in FOUR_BIT
    if data.get("prompt_template") is not None and data.get("format", "auto") == "auto":
        data["format"] = "prompt_completion"
    if training.get("max_steps") is not None:
        training["epochs"] = None
    if training.get("micro_batch_size") is None:
        training["micro_batch_size"] = "auto"
    if training.get("batch_size") is None and training.get("gradient_accumulation_steps") is None:
        training["batch_size"] = DEFAULT_BATCH_SIZE
    filled = {"model": model, "data": data, "training": training}
    return {k: filled[k] if k in filled and isinstance(v, dict) else v for k, v in values.items()}


NO_DROPOUT_WITH_EXPERTS = (
    "must be 0 with target_parameters: PEFT adds B A to the weights of experts, and cannot drop their inputs"
)
NO_DROPOUT_WITH_DORA = (
    "must be 0 with use_dora, which scales the base's output too: that would have to be computed a second "
    "time, from the input that is left"
)


def contradictions(values: Mapping[str, Any]) -> Iterator[tuple[KeyPath, str]]:
    """Contradictions between keys, as (key to change, message)."""
    model, lora, data, training = _sections(values, "model", "lora", "data", "training")
    targets = lora.get("target_modules", "all-linear")
    if lora.get("layers_to_transform") is not None and isinstance(targets, str) and targets != "all-linear":
        yield (
            ("lora", "layers_to_transform"),
            "only beside all-linear or a list of name endings, and target_modules is a regular expression: "
            "let the expression say the layers",
        )
    if isinstance(targets, list | tuple) and not targets and not lora.get("target_parameters"):
        yield ("lora", "target_modules"), "is empty, and so is target_parameters: nothing would be trained"
    if lora.get("use_dora") and lora.get("dropout"):
        yield ("lora", "dropout"), NO_DROPOUT_WITH_DORA
    if lora.get("target_parameters") and lora.get("dropout"):
        yield ("lora", "dropout"), NO_DROPOUT_WITH_EXPERTS
    if lora.get("target_parameters") and lora.get("use_dora"):
        yield (
            ("lora", "use_dora"),
            "is for linears, and PEFT refuses it with target_parameters: remove one of them",
        )
    if lora.get("use_dora") and lora.get("lora_bias"):
        yield ("lora", "lora_bias"), "must be false with use_dora, as in PEFT"
    if lora.get("target_parameters") and lora.get("lora_bias"):
        yield ("lora", "lora_bias"), "must be false with target_parameters, as in PEFT"
    if lora.get("init_lora_weights", True) is not True:
        for key in ("init_from", "use_dora", "lora_bias", "target_parameters"):
            if lora.get(key):
                yield ("lora", "init_lora_weights"), f"must be true with {key}, or leave {key} out"
        if model.get("add_tokens"):
            yield ("lora", "init_lora_weights"), "must be true with model.add_tokens, or leave add_tokens out"
    quantization = model.get("quantization", "nf4")
    if model.get("double_quant") is not None and quantization in ("int8", "none"):
        yield (
            ("model", "double_quant"),
            f"only for nf4 and fp4, and quantization is {quantization}; remove it or write null",
        )
    if model.get("revision") is not None and Path(str(model.get("base", ""))).is_absolute():
        yield ("model", "revision"), "names a revision on the hub, but base is a local folder; remove it"
    if training.get("epochs") is not None and training.get("max_steps") is not None:
        yield ("training", "max_steps"), "contradicts training.epochs: write one of them"
    if "epochs" in training and training["epochs"] is None and training.get("max_steps") is None:
        yield ("training", "epochs"), "epochs and max_steps are both null: write one of them"
    yield from _batch_contradictions(training, data)
    if training.get("eval_every") is not None and data.get("eval") is None:
        yield ("training", "eval_every"), "there is nothing to evaluate: write data.eval too"
    if training.get("early_stopping") is not None:
        if data.get("eval") is None:
            yield ("training", "early_stopping"), "looks at the evaluation loss: write data.eval too"
        if training.get("eval_every") is None:
            yield (
                ("training", "early_stopping"),
                "needs evaluations on the way: write training.eval_every too",
            )
    for i, source in enumerate(data["eval"] if isinstance(data.get("eval"), list) else []):
        if isinstance(source, dict) and source.get("weight") not in (None, 1, 1.0):
            yield ("data", "eval", i, "weight"), "weights are for training; evaluation sees each row once"
    format_name = data.get("format", "auto")
    template = data.get("prompt_template")
    if template is not None and format_name not in ("auto", "prompt_completion"):
        yield ("data", "prompt_template"), f"only for format prompt_completion, and format is {format_name}"
    if isinstance(template, str):
        yield from ((("data", "prompt_template"), message) for message in _template_problems(template))
    columns = data.get("columns")
    every_role = tuple(dict.fromkeys(sum(COLUMN_ROLES.values(), ())))
    roles = COLUMN_ROLES.get(format_name, every_role) if isinstance(format_name, str) else ()
    if isinstance(columns, dict) and roles:
        for role in columns:
            if role not in roles:
                guess = nearest(str(role), roles)
                yield ("data", "columns", role), f"format {format_name} has {', '.join(roles)}" + guess
            elif columns[role] is None and role not in OPTIONAL_ROLES:
                yield ("data", "columns", role), "null (not read) is only for roles that are optional"


def _batch_contradictions(
    training: Mapping[str, Any], data: Mapping[str, Any]
) -> Iterator[tuple[KeyPath, str]]:
    """Contradictions between the batch size keys, and micro-batches that are too large."""
    names = ("batch_size", "micro_batch_size", "gradient_accumulation_steps")
    batch_size, micro_batch_size, steps = (
        training[name] if _is_count(training.get(name)) else None for name in names
    )
    if steps is not None and micro_batch_size is None and batch_size is None:
        yield (
            ("training", "gradient_accumulation_steps"),
            "says how many micro-batches a step has, not how large one is: write training.batch_size "
            "instead, or training.micro_batch_size beside it",
        )
        return
    if batch_size is None and steps is None:
        batch_size = DEFAULT_BATCH_SIZE
    divisor = (micro_batch_size or 1) * (steps or 1)
    if batch_size is not None and batch_size % divisor:
        written = " x ".join(name for name in names[1:] if _is_count(training.get(name)))
        yield (
            ("training", names[1] if micro_batch_size else names[2]),
            f"training.batch_size is {batch_size}, which is no multiple of {written} = {divisor}: write "
            "training.batch_size alone, or two that agree",
        )
    length = data.get("sequence_length", 2048)
    if micro_batch_size is not None and _is_count(length) and micro_batch_size * length > MOST_TOKENS:
        yield (
            ("training", "micro_batch_size"),
            f"makes a micro-batch of {micro_batch_size * length:,} tokens with data.sequence_length {length}"
            f"; at most {MOST_TOKENS:,} are planned for",
        )


def _template_problems(template: str) -> Iterator[str]:
    """Messages for a prompt template that is not text with plain `{column}` names in it."""
    try:
        fields = [field[1:] for field in string.Formatter().parse(template) if field[1] is not None]
    except ValueError as error:
        yield f"not a template ({error}); a brace that is text is written twice: {{{{ or }}}}"
        return
    if not fields:
        yield 'names no column; write it like "Describe: {mr}\\n"'
    for name, format_spec, conversion in fields:
        if not name or name.isdigit() or any(c in name for c in ".[]!") or format_spec or conversion:
            yield f"{{{name}}} is not a plain column name such as {{question}}"
