"""Whether QLoRA learns what LoRA in 16 bits learns, on a model that knows something.

    pre-training   a LLaMA from random weights, with plain torch and transformers, on text that the
                   quickstart generates (recipes/quickstart/corpus.py): repeat, spell, ... made-up words
    adapting       twice by `train`, with the linears in NF4 and in 16 bits, on what no pre-training text
                   shows: pig latin
    compared       the losses on held-out words, which are in no training text

The loss is that of all tokens. The words are random, so it ends far above zero: there a difference of a
percent says something, where a loss of nearly nothing would make it noise.
"""

from __future__ import annotations

import gc
import importlib
import json
import random
import sys
import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel

from benchmarks.gpu_suite.training import device_bytes
from benchmarks.pieces.figures import compute_device
from benchmarks.process import answer
from qlora_train.micro_batch import IGNORED_LABEL
from qlora_train.recipe import Recipe
from qlora_train.recipe.files import bundled_recipes_dir
from qlora_train.train import train

WARM_UP_STEPS = 50
NF4, IN_16_BITS = "NF4", "16 bits"


def measure(arguments: dict[str, Any]) -> dict[str, Any]:
    """arguments: work; sizes: of the model's config; pretraining: num_rows of a step, learning_rate, and
    where it ends, max_steps or max_seconds; num_train_rows, num_eval_rows; training: of the recipe;
    tolerance: of the relative difference of the losses; least_fall: the part of the loss that adapting has to
    remove, or nothing is compared."""
    sys.path.insert(0, str(bundled_recipes_dir() / "quickstart"))
    corpus, quickstart = importlib.import_module("corpus"), importlib.import_module("pretrain")
    folder = Path(arguments["work"]) / "learns"
    tokenizer = quickstart.build_tokenizer()
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("high")  # the tensor cores of a GPU
    remark = _pretrain(folder / "base", corpus, quickstart, tokenizer, arguments)
    torch.set_float32_matmul_precision(before)
    files = {"train": (arguments["num_train_rows"], False), "eval": (arguments["num_eval_rows"], True)}
    for name, (number, held_out) in files.items():
        rows = corpus.pig_latin_rows(random.Random(number), number, held_out)
        (folder / f"{name}.jsonl").write_text(
            "".join(json.dumps({"text": _text(row)}) + "\n" for row in rows), encoding="utf-8"
        )
    formats = {NF4: "nf4", IN_16_BITS: "none"}
    runs = {name: _adapt(folder, name, form, arguments["training"]) for name, form in formats.items()}
    problems, compared = compare(runs, arguments["tolerance"], arguments["least_fall"])
    return {"runs": runs, "remarks": [remark, compared], "problems": problems}


def _text(messages: list[dict[str, str]]) -> str:
    """A question and its answer as one document."""
    question, said = messages
    return f"{question['content']} -> {said['content']}"


def _pretrain(folder: Path, corpus: Any, quickstart: Any, tokenizer: Any, arguments: dict[str, Any]) -> str:
    """Into a folder as transformers writes it; what was done, in words. The learning rate falls to zero by
    steps or by the clock, whichever ends first."""
    torch.manual_seed(0)
    ids = {f"{name}_token_id": getattr(tokenizer, f"{name}_token_id") for name in ("bos", "eos", "pad")}
    shape = {"vocab_size": len(tokenizer), "max_position_embeddings": 1024, "tie_word_embeddings": False}
    where, config = compute_device().torch, LlamaConfig(**{**arguments["sizes"], **shape, **ids})
    model: Any = LlamaForCausalLM(config).to(where)  # type: ignore[arg-type]  # transformers types it so
    asked, draw = arguments["pretraining"], random.Random(1)
    optimizers = quickstart.build_optimizers(model, asked["learning_rate"])
    started, done, step, losses = time.monotonic(), 0.0, 0, list[Tensor]()
    while done < 1:
        rows = [_text(corpus.pretraining_row(draw, held_out=False)) for _ in range(asked["num_rows"])]
        step += 1
        rate = min(1 - done, step / WARM_UP_STEPS)
        losses.append(_step(model, _batch(rows, tokenizer).to(where), optimizers, rate))
        done = max(step / asked["max_steps"], (time.monotonic() - started) / asked["max_seconds"])
    seconds = time.monotonic() - started
    num_parameters, last = model.num_parameters(), float(torch.stack(losses[-20:]).mean())
    model.to(torch.bfloat16).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return (
        f"{num_parameters / 1e6:.1f}M parameters pre-trained in {step} steps of {asked['num_rows']} rows, "
        f"{seconds:.0f} s, to a loss of {last:.3f}"
    )


def _batch(rows: list[str], tokenizer: Any) -> Tensor:
    """Token ids [rows, longest], padded on the right, where causal attention does not look."""
    ids: Tensor = tokenizer(
        [row + tokenizer.eos_token for row in rows], padding=True, return_tensors="pt"
    ).input_ids
    return ids


def _step(
    model: PreTrainedModel, ids: Tensor, optimizers: list[torch.optim.Optimizer], rate: float
) -> Tensor:
    """Of pre-training; the loss. rate: of the learning rate."""
    labels = ids.masked_fill(ids == model.config.pad_token_id, IGNORED_LABEL)
    loss: Tensor = model(input_ids=ids, labels=labels, use_cache=False).loss
    loss.backward()
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["lr"] = group.setdefault("initial_lr", group["lr"]) * rate
        optimizer.step()
        optimizer.zero_grad()
    return loss.detach()


def _adapt(folder: Path, name: str, form: str, training: dict[str, Any]) -> dict[str, Any]:
    """A run, and what its files say."""
    gc.collect()
    compute_device().release_cached()
    if compute_device().is_accelerator:
        compute_device().reset_peaks()
    run = folder / form
    values = {
        "model": {"base": str(folder / "base"), "quantization": form},
        "lora": {"rank": 16, "alpha": 32},
        "data": {
            "train": str(folder / "train.jsonl"),
            "eval": str(folder / "eval.jsonl"),
            "format": "text",
            "sequence_length": 256,
        },
        "training": {"output_dir": str(run), "lr_schedule": "cosine", "warmup_ratio": 0.05, **training},
    }
    started = time.monotonic()
    train(Recipe.from_dict(values))
    seconds = time.monotonic() - started
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    evaluations = [row["eval_loss"] for row in rows if "eval_loss" in row]
    plan = json.loads((run / "plan.json").read_text())
    return {
        "base_eval_loss": evaluations[0],
        "eval_loss": evaluations[-1],
        "tokens_per_second": [row["tokens_per_second"] for row in rows if "loss" in row][-1],
        "run_seconds": seconds,
        "measured_step_device_bytes": plan["measured_step_vram_bytes"],
    } | device_bytes(compute_device())


def compare(runs: dict[str, dict[str, Any]], tolerance: float, least_fall: float) -> tuple[list[str], str]:
    """(problems, the comparison in words)."""
    nf4, reference = runs[NF4], runs[IN_16_BITS]
    difference = nf4["eval_loss"] / reference["eval_loss"] - 1
    fall = 1 - reference["eval_loss"] / reference["base_eval_loss"]
    lost = (nf4["eval_loss"] - reference["eval_loss"]) / (
        reference["base_eval_loss"] - reference["eval_loss"]
    )
    said = (
        f"held-out loss in 16 bits {reference['base_eval_loss']:.4f} -> {reference['eval_loss']:.4f}, in NF4 "
        f"{nf4['base_eval_loss']:.4f} -> {nf4['eval_loss']:.4f}: {difference:+.2%}, {lost:+.2%} "
        "of what was learned"
    )
    problems = []
    if abs(difference) > tolerance:
        problems.append(f"{said}; at most {tolerance:.0%} are asked for")
    if fall < least_fall:
        problems.append(f"{said}; too little was learned to compare")
    return problems, said


if __name__ == "__main__":
    answer(measure)
