"""QLoRA fine-tuning of LLaMA-class models on one GPU.

    from qlora_train import load_recipe, train, export
    run = train(load_recipe("recipe.yaml", ["training.max_steps=100"]))
    export(run.run_dir, to="merged")

`train` and `export` load torch at first use, so that importing the package stays cheap. Both are functions
here and folders on disk: a plain lazy attribute would be overwritten by the import system, which binds a
sub-package to its parent when anything imports it. Properties of the package's own class are not.
"""

from __future__ import annotations

import sys
from types import ModuleType
from typing import TYPE_CHECKING, Any

from qlora_train.recipe import Recipe, load_recipe

if TYPE_CHECKING:
    from qlora_train.export import export as export
    from qlora_train.train import train as train

__version__ = "0.1.0"
__all__ = ["Recipe", "__version__", "export", "load_recipe", "train"]


class _Package(ModuleType):
    @property
    def train(self) -> Any:
        from qlora_train.train import train

        return train

    @train.setter
    def train(self, sub_package: ModuleType) -> None:
        """`qlora_train.train` stays the function; `from qlora_train.train import` reaches the folder."""

    @property
    def export(self) -> Any:
        from qlora_train.export import export

        return export

    @export.setter
    def export(self, sub_package: ModuleType) -> None:
        """As for `train`."""


sys.modules[__name__].__class__ = _Package
