"""QLoRA fine-tuning of LLaMA-class models on one GPU.

    from qlora_train import evaluate, export, generate, load_recipe, plan, train
    recipe = load_recipe("recipe.yaml", ["training.max_steps=100"])
    print(plan(recipe)["fits"])
    run = train(recipe)
    print(evaluate(run.run_dir, with_base=True))
    print(generate(run.run_dir, ["A question?"]))
    export(run.run_dir, to="merged")

`save_rows(rows, "rows.jsonl")` writes rows that are in memory, or a `datasets.Dataset`, for a recipe to name.

These import torch when they are called, so that importing the package is fast. Most are also names of
subpackages, and importing a subpackage binds its name here: so they are imported now, and the names are bound
to the functions afterwards.
"""

from __future__ import annotations

import logging

from qlora_train.export import export
from qlora_train.generate import evaluate, generate
from qlora_train.plan import plan
from qlora_train.recipe import Recipe, load_recipe
from qlora_train.rows_file import save_rows
from qlora_train.train import train

# Its one line says at import, on a CPU with bfloat16, that a kernel is missing which nothing here calls.
logging.getLogger("bitsandbytes.backends.cpu.ops").setLevel(logging.ERROR)

__version__ = "0.1.0"
__all__ = [
    "Recipe",
    "__version__",
    "evaluate",
    "export",
    "generate",
    "load_recipe",
    "plan",
    "save_rows",
    "train",
]
