"""QLoRA fine-tuning of LLaMA-class models on one GPU.

    from qlora_train import load_recipe, train, export
    run = train(load_recipe("recipe.yaml", ["training.max_steps=100"]))
    export(run.run_dir, to="merged")

`train` and `export` import torch when they are called, so that importing the package is fast. Both are also
names of subpackages, and importing a subpackage binds its name here: so both are imported now, and the names
are bound to the functions afterwards.
"""

from __future__ import annotations

from qlora_train.export import export
from qlora_train.recipe import Recipe, load_recipe
from qlora_train.train import train

__version__ = "0.1.0"
__all__ = ["Recipe", "__version__", "export", "load_recipe", "train"]
