"""What cases run on, made once in the bench's folder: a base with random weights, rows of random words, a run
with random factors.

Nothing is downloaded and nothing needs to be: what a step costs does not depend on what the weights say. The
tokenizer has one token per word ("w17"), so a row has exactly as many tokens as it has words, one more for
the end of the text, whoever tokenises it. Everything is drawn from seeds: two machines measure the same.
"""

from __future__ import annotations

import json
import math
import random
import zlib
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import Tensor
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    PretrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerFast,
)

from benchmarks.pieces.figures import compute_device, compute_dtype
from benchmarks.process import answer
from qlora_train.adapter.adapter_config import AdapterConfig, name_targets
from qlora_train.adapter.adapter_files import save_adapter
from qlora_train.device.compute_dtype import dtype_name
from qlora_train.files.atomic_folder import atomic_folder
from qlora_train.quant.formats import Quantization
from qlora_train.recipe import Recipe
from qlora_train.weights.cache_key import cache_root
from qlora_train.weights.load import load_base

SPECIAL = ("<pad>", "<eos>")
WEIGHT_SPREAD = 0.02
MIN_WORDS = 8
NUM_NORMAL = 2**24 - 3
"""Odd, so that rows of a matrix do not repeat."""


def measure(arguments: dict[str, Any]) -> dict[str, Any]:
    """arguments: folder; base: a name and a config (`write_base`); rows, if any: a file name, a kind and its
    sizes (`rows_of`); run_rank, if any: of a finished run's adapter; is_quantized: whether the quantized
    cache is to hold the base. Returns where they are; bases and runs that are there are left as they are."""
    folder = Path(arguments["folder"])
    config = arguments["base"]["config"]
    digest = zlib.crc32(json.dumps(config, sort_keys=True).encode())
    base = folder / "bases" / f"{arguments['base']['name']}-{digest:08x}"
    if not base.is_dir():
        with atomic_folder(base) as partial:
            write_base(partial, config)
    paths = {"base": str(base)}
    if arguments.get("rows"):
        rows = dict(arguments["rows"])
        vocabulary_size = config["vocab_size"]
        file = folder / "rows" / f"{rows.pop('name')}-{vocabulary_size}.jsonl"
        file.parent.mkdir(parents=True, exist_ok=True)
        partial_file = file.with_suffix(".partial")
        partial_file.write_text("".join(json.dumps(row) + "\n" for row in rows_of(rows, vocabulary_size)))
        partial_file.replace(file)
        paths["rows"] = str(file)
    if arguments.get("is_quantized"):
        load_base(
            base,
            Quantization("nf4", double_quant=True),
            compute_dtype(),
            compute_device(),
            cache=cache_root(),
        )
    if arguments.get("run_rank"):
        run = folder / "runs" / f"{base.name}-r{arguments['run_rank']}-{dtype_name(compute_dtype())}"
        if not run.is_dir():
            with atomic_folder(run) as partial:
                write_run(partial, base, arguments["run_rank"])
        paths["run"] = str(run)
    return {"paths": paths}


def write_base(folder: Path, config_values: dict[str, Any]) -> None:
    """A checkpoint in bfloat16, a file per decoder layer, so that one layer is in memory at a time.

    config_values: with `model_type`, as in config.json."""
    values = {"eos_token_id": 1, "pad_token_id": 0, "bos_token_id": None, **config_values}
    config = AutoConfig.for_model(**values)
    model = _without_weights(config)
    shapes = dict(model.named_parameters())
    files: dict[str, list[str]] = {}
    for name in shapes:  # a tied head is not among the parameters
        part = f"layer-{int(name.split('.')[2]):03}" if ".layers." in name else "ends"
        files.setdefault(f"model-{part}.safetensors", []).append(name)
    for file_name, names in files.items():
        tensors = {name: _weight(name, shapes[name]) for name in names}
        save_file(tensors, folder / file_name, metadata={"format": "pt"})
    weight_map = {name: file_name for file_name, names in files.items() for name in names}
    num_bytes = sum(2 * shape.numel() for shape in shapes.values())
    index = {"metadata": {"total_size": num_bytes}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=1))
    config.architectures = [type(model).__name__]
    config.dtype = torch.bfloat16
    config.save_pretrained(folder)
    word_tokenizer(config.vocab_size).save_pretrained(folder)


def write_run(folder: Path, base: Path, rank: int) -> None:
    """What an export needs of a finished run: its recipe, and an adapter with random factors on all linears
    of the decoder layers."""
    model = _without_weights(AutoConfig.from_pretrained(base))
    linears = {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, torch.nn.Linear) and ".layers." in name
    }
    lora = {
        name: (
            _weight(f"{name}.A", torch.empty(rank, linear.in_features)),
            _weight(f"{name}.B", torch.empty(linear.out_features, rank)),
        )
        for name, linear in linears.items()
    }
    config = AdapterConfig(str(base), rank, 2 * rank, target_modules=name_targets(linears, linears)[0])
    save_adapter(folder / "adapter", config, lora)
    recipe = Recipe.from_dict(
        {
            "model": {"base": str(base), "compute_dtype": dtype_name(compute_dtype())},
            "data": {"train": "rows.jsonl"},
        }
    )
    (folder / "recipe.yaml").write_text(recipe.to_yaml())


def _without_weights(config: PretrainedConfig) -> PreTrainedModel:
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)


@cache
def _normal_numbers() -> Tensor:
    """bfloat16 [NUM_NORMAL]. Drawing 8 billion numbers would take minutes; what is measured does not see that
    weights are made of the same ones, each beginning at another."""
    generator = torch.Generator().manual_seed(0)
    return (torch.randn(NUM_NORMAL, generator=generator) * WEIGHT_SPREAD).to(torch.bfloat16)


def _weight(name: str, like: Tensor) -> Tensor:
    if like.dim() == 1:
        return torch.ones(like.shape, dtype=torch.bfloat16)
    weight = torch.empty(like.shape, dtype=torch.bfloat16)
    numbers, flat = _normal_numbers(), weight.view(-1)
    first = numbers[zlib.crc32(name.encode()) % NUM_NORMAL :]
    flat[: len(first)] = first[: len(flat)]
    for part in flat[len(first) :].split(NUM_NORMAL):
        part.copy_(numbers[: len(part)])
    return weight


def word_tokenizer(vocabulary_size: int) -> PreTrainedTokenizerFast:
    """<pad>, <eos>, then w2, w3, ...: a token per word, nothing put before or behind."""
    ordinary = (f"w{i}" for i in range(len(SPECIAL), vocabulary_size))
    words = {word: i for i, word in enumerate((*SPECIAL, *ordinary))}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="<eos>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", eos_token="<eos>")


def rows_of(sizes: dict[str, Any], vocabulary_size: int) -> Iterator[dict[str, str]]:
    """kind "texts": rows of num_tokens tokens each, the end included. kind "prompts": prompt and completion
    of log-normal length (mean_tokens, sigma) up to max_tokens, half of it prompt."""
    draw = random.Random(0)

    def words(number: int) -> str:
        return " ".join(f"w{draw.randrange(len(SPECIAL), vocabulary_size)}" for _ in range(number))

    for _ in range(sizes["num_rows"]):
        if sizes["kind"] == "texts":
            yield {"text": words(sizes["num_tokens"] - 1)}
        else:
            assert sizes["kind"] == "prompts", sizes["kind"]
            mu = math.log(sizes["mean_tokens"]) - sizes["sigma"] ** 2 / 2
            drawn = round(draw.lognormvariate(mu, sizes["sigma"]))
            num_words = min(max(drawn, MIN_WORDS), sizes["max_tokens"]) - 1
            prompt, completion = words(num_words // 2), words(num_words - num_words // 2)
            yield {"prompt": f"{prompt} ", "completion": completion}


if __name__ == "__main__":
    answer(measure)
