"""The whole job in two minutes: answer, train, answer, export, answer again with plain transformers.

    python recipes/quickstart/demo.py [OUTPUT_DIR]        (default runs/demo, replaced if it is there)

The same held-out prompts are answered by the quantized base, by base + adapter, and by the merged fp16 folder
loaded with nothing but transformers. An answer counts when it is exactly right.
"""

from __future__ import annotations

import json
import shutil
import sys
import time
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.utils import logging as transformers_logging

from qlora_train import export, load_recipe, train
from qlora_train.generate.model_folder import find_run
from qlora_train.generate.sampling import Sampling
from qlora_train.kernels.on_device import find_device
from qlora_train.plan.planned_walk import GenerateSize
from qlora_train.recipe import Recipe

HERE = Path(__file__).parent
NUM_SHOWN = 6
MAX_NEW_TOKENS = 48


def main(output_dir: Path) -> None:
    """Run every step and print what changed."""
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    console = Console(highlight=False)
    started = time.monotonic()
    if (output_dir / "recipe.yaml").is_file():
        shutil.rmtree(output_dir)  # an earlier demo's
    recipe = load_recipe(HERE / "recipe.yaml", [f"training.output_dir={output_dir}"])
    prompts, expected = held_out()

    console.rule("1. the quantized base, before training")
    before = answers(output_dir, recipe, prompts, with_adapter=False)
    console.print(f"exact: {score(before, expected)}")
    console.rule("2. training")
    train(recipe)
    console.rule("3. base + adapter")
    after = answers(output_dir, recipe, prompts, with_adapter=True)
    console.print(f"exact: {score(after, expected)}")
    console.rule("4. merged fp16 weights, loaded with plain transformers")
    merged_dir = export(output_dir, log=lambda line: console.print(line, markup=False, soft_wrap=True))
    merged = answers_with_transformers(merged_dir, prompts)
    console.print(f"exact: {score(merged, expected)}")

    table = Table("prompt", "right answer", "before", "base + adapter", "merged")
    for row in list(zip(prompts, expected, before, after, merged, strict=True))[:NUM_SHOWN]:
        table.add_row(*row)
    console.print(table)
    console.print(
        f"held-out prompts answered exactly: before {score(before, expected)}, base + adapter "
        f"{score(after, expected)}, merged {score(merged, expected)}   ({time.monotonic() - started:.0f} s)"
    )
    console.print(
        f"try your own: qlora-train generate {output_dir} --prompt {json.dumps(prompts[0])}", markup=False
    )


def held_out() -> tuple[list[str], list[str]]:
    """Prompts and right answers of the held-out set."""
    rows = [json.loads(line)["messages"] for line in (HERE / "heldout.jsonl").read_text().splitlines()]
    return [messages[-2]["content"] for messages in rows], [messages[-1]["content"] for messages in rows]


def answers(run: Path, recipe: Recipe, prompts: list[str], *, with_adapter: bool) -> list[str]:
    """Greedy answers of the quantized base, with the run's adapter or without."""
    source = find_run(run, recipe, find_device(), run / "adapter" if with_adapter else None)
    encoded = [source.encode(prompt) for prompt in prompts]
    return list(source.load(GenerateSize()).answers(encoded, Sampling(MAX_NEW_TOKENS), len(encoded)))


def answers_with_transformers(folder: Path, prompts: list[str]) -> list[str]:
    """Greedy answers of a merged folder, by transformers alone (fp32 arithmetic on the fp16 weights)."""
    device = find_device().torch
    tokenizer = AutoTokenizer.from_pretrained(folder, padding_side="left")
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, device_map=device).eval()
    chats = [[{"role": "user", "content": prompt}] for prompt in prompts]
    texts = [
        tokenizer.apply_chat_template(chat, add_generation_prompt=True, tokenize=False) for chat in chats
    ]
    batch = tokenizer(texts, return_tensors="pt", padding=True, add_special_tokens=False).to(device)
    with torch.no_grad():
        output = model.generate(
            batch.input_ids,
            attention_mask=batch.attention_mask,
            max_new_tokens=MAX_NEW_TOKENS,
            do_sample=False,
            pad_token_id=tokenizer.pad_token_id,
        )
    new = output[:, batch.input_ids.shape[1] :]
    return [str(text) for text in tokenizer.batch_decode(new, skip_special_tokens=True)]


def score(given: list[str], expected: list[str]) -> str:
    """Share of exactly right answers."""
    return f"{100 * sum(a == b for a, b in zip(given, expected, strict=True)) / len(expected):.1f} %"


if __name__ == "__main__":
    main(Path(sys.argv[1] if len(sys.argv) > 1 else "runs/demo"))
