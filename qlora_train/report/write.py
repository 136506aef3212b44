"""Writes pages: a run's into its folder, a comparison where it is asked for."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from qlora_train.adapter.trained_on import find_base
from qlora_train.errors import QloraTrainError, UserError
from qlora_train.files.atomic_file import replace_text
from qlora_train.report.adapter_facts import adapter_facts
from qlora_train.report.page import comparison_page, run_page
from qlora_train.report.run_facts import RunFacts

FILE_NAME = "report.html"
COMPARISON = "comparison.html"


def write_report(run: Path, *, with_base: bool = False) -> Path:
    """Write a run's `report.html`; returns the file. with_base: read the base's weights for the
    amplification, which takes as long as reading them does. Raises `RunFolderError` for a folder that holds
    no run, and `BaseModelError` where the base is not there."""
    facts = RunFacts.read(run)
    base = find_base(facts.recipe.model, run)[0] if with_base else None
    modules = [] if facts.adapter is None else adapter_facts(facts.adapter, base)
    file = run / FILE_NAME
    replace_text(file, run_page(facts, modules))
    return file


def write_comparison(runs: Sequence[Path], out: Path | None = None) -> Path:
    """Write a page that compares runs; returns the file. out: None: `comparison.html` here."""
    file = out or Path(COMPARISON)
    if file.is_dir() or not file.absolute().parent.is_dir():
        raise UserError(f"{file}: is not a file in a folder that is there; name one with --out")
    page = comparison_page([RunFacts.read(run) for run in runs])
    replace_text(file, page)
    return file


def report_command(runs: Sequence[Path], *, out: Path | None, with_base: bool) -> None:
    """`qlora-train report`: a page for each run, and for several one that compares them; prints their
    names."""
    if out is not None and len(runs) == 1:
        raise UserError("--out names the page that compares runs; one run has its page in its folder")
    for run in runs:
        print(write_report(run, with_base=with_base))
    if len(runs) > 1:
        print(write_comparison(runs, out))


def refresh_report(run: Path) -> str | None:
    """Write a run's page while it trains; returns what went wrong, as training is not to end for it."""
    try:
        write_report(run)
    except (QloraTrainError, OSError) as error:
        return f"{run / FILE_NAME}: could not be written ({error})"
    return None
