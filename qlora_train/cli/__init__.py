"""The commands of `qlora-train`: their arguments, and which function of the package each calls."""

from qlora_train.cli.command_line import main

__all__ = ["main"]
