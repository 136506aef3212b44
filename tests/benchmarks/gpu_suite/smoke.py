"""A minute on the device: the bundled quickstart through what every command does, beside the CPU's losses.

Each check is made whatever became of those before it:

    train       as users do, evaluations included (compute dtype auto, deterministic)
    resume      the same, killed (SIGKILL) in a process of its own, then resumed here: the same adapter
    float32     the same, streamed from RAM in fp32
    losses      of both, beside those of the same recipe on the CPU in fp32, made in a process of its own
                meanwhile
    generate    an answer, token by token to the screen, of the run that streams
    export      merged; and the merged folder answers
"""

from __future__ import annotations

import contextlib
import io
import json
import os
import signal
import subprocess
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from benchmarks.process import NUM_ERROR_LINES, PLAINLY, answer, error_lines
from qlora_train.export import export
from qlora_train.generate.command import generate_command
from qlora_train.generate.sampling import Sampling
from qlora_train.recipe import load_recipe
from qlora_train.recipe.files import bundled_recipes_dir
from qlora_train.train import train

ON_THE_CPU = {"ACCELERATE_TORCH_DEVICE": "cpu", "CUDA_VISIBLE_DEVICES": ""}
LOSS_TOLERANCE = {"train": 0.02, "float32": 0.001}
"""Relative to the CPU's in fp32: 16-bit arithmetic, and another order of sums."""
NUM_COMPARED = 5
"""Steps that are held to it: from step to step small differences grow."""
WAIT_SECONDS = 150.0


class Smoke:
    """What the checks share. arguments: see `measure`."""

    def __init__(self, arguments: dict[str, Any]) -> None:
        self.folder = Path(arguments["work"]) / "smoke" / str(os.getpid())
        self.folder.mkdir(parents=True)
        self._launcher: Sequence[str] = arguments.get("launcher", PLAINLY)
        self._num_steps, self._kill_at = arguments["num_steps"], arguments["kill_at"]
        self._common = [
            f"training.max_steps={self._num_steps}",
            f"training.eval_every={self._num_steps // 2}",
            f"data.train={self._rows('train', arguments['num_train_rows'])}",
            f"data.eval={self._rows('heldout', arguments['num_eval_rows'])}",
            *arguments["overrides"],
        ]
        self.runs: dict[str, dict[str, Any]] = {}
        self.problems: list[str] = []
        self.remarks: list[str] = []

    def check(self, name: str, work: Callable[[], dict[str, Any]]) -> None:
        """Do it and keep its figures, or the end of its traceback."""
        started = time.perf_counter()
        try:
            self.runs[name] = work() | {"check_seconds": time.perf_counter() - started}
        except Exception:  # whatever it is: the checks behind it are to be made
            self.problems.append(f"{name}: {error_lines()}")

    def start(self, name: str, *overrides: str, launcher: Sequence[str], **environment: str) -> Any:
        """`qlora-train train` in a process of its own."""
        command = [*launcher, "qlora_train", "train", "quickstart", *self._overrides(name, *overrides)]
        with (self.folder / f"{name}.log").open("w") as log:
            return subprocess.Popen(
                command, stdout=log, stderr=subprocess.STDOUT, env={**os.environ, **environment}
            )

    def train(self, name: str, *overrides: str, resume: bool = False) -> dict[str, Any]:
        """Here; its figures."""
        train(load_recipe("quickstart", self._overrides(name, *overrides)), resume=resume)
        rows = self.rows(name)
        steps = [row for row in rows if "loss" in row]
        assert len(steps) == self._num_steps, f"{len(steps)} of {self._num_steps} steps"
        evaluations = [row["eval_loss"] for row in rows if "eval_loss" in row]
        assert len(evaluations) == 3, f"3 evaluations are due, {evaluations} were made"
        plan = json.loads((self.folder / name / "plan.json").read_text())
        return {
            "first_loss": steps[0]["loss"],
            "last_loss": steps[-1]["loss"],
            "eval_losses": evaluations,
            "tokens_per_second": steps[-1]["tokens_per_second"],
            "device": plan["device"],
            "planned_step_device_bytes": plan["step_vram_bytes"],
            "measured_step_device_bytes": plan["measured_step_vram_bytes"],
        }

    def resume(self) -> dict[str, Any]:
        """Kill the run after a step and go on here."""
        child = self.start("killed", "training.deterministic=true", launcher=self._launcher)
        try:
            ends = time.monotonic() + WAIT_SECONDS
            while child.poll() is None and len(self.losses("killed")) < self._kill_at:
                assert time.monotonic() < ends, f"step {self._kill_at} is not reached"
                time.sleep(0.001)
        finally:
            child.send_signal(signal.SIGKILL)
            child.wait()
        num_done = len(self.losses("killed"))
        log = "\n".join((self.folder / "killed.log").read_text().splitlines()[-NUM_ERROR_LINES:])
        assert child.returncode == -signal.SIGKILL and num_done >= self._kill_at, (
            f"it was not killed at work: {log}"
        )
        figures = self.train("killed", "training.deterministic=true", resume=True)
        adapters = [self.folder / run / "adapter/adapter_model.safetensors" for run in ("train", "killed")]
        assert adapters[0].read_bytes() == adapters[1].read_bytes(), "resumed, it ends with other bytes"
        return figures | {"killed_after_steps": num_done}

    def compare_losses(self, name: str, child: Any) -> dict[str, Any]:
        """Of a run here with those of the one on the CPU."""
        code = child.wait(WAIT_SECONDS)
        log = "\n".join((self.folder / "cpu.log").read_text().splitlines()[-NUM_ERROR_LINES:])
        assert code == 0, f"the run on the CPU failed: {log}"
        here, there = self.losses(name), self.losses("cpu")
        differences = [abs(a / b - 1) for a, b in zip(here, there, strict=True)]
        largest = max(differences[:NUM_COMPARED])
        assert largest <= LOSS_TOLERANCE[name], (
            f"losses differ by up to {largest:.2%} from the CPU's: {here}, {there}"
        )
        return {"loss_difference": largest, "loss_difference_of_all": max(differences)}

    def generate(self, target: Path) -> dict[str, Any]:
        """One prompt of the held-out data: its answer comes token by token."""
        row = json.loads((self.folder / "heldout.jsonl").read_text().splitlines()[0])
        prompt = row["messages"][-2]["content"]
        screen = io.StringIO()
        with contextlib.redirect_stdout(screen):
            generate_command(target, [prompt], Sampling(16))
        assert screen.getvalue().strip(), "no answer"
        self.remarks.append(f"{target.name}: {prompt} -> {screen.getvalue().strip()}")
        return {}

    def export(self, run: Path) -> dict[str, Any]:
        """Merge, and let the merged folder answer."""
        merged = self.folder / "merged"
        export(run, out=merged)
        return self.generate(merged)

    def rows(self, name: str) -> list[dict[str, Any]]:
        """Of metrics.jsonl, as far as lines are complete."""
        file = self.folder / name / "metrics.jsonl"
        lines = file.read_text().split("\n")[:-1] if file.is_file() else []
        return [json.loads(line) for line in lines]

    def losses(self, name: str) -> list[float]:
        return [row["loss"] for row in self.rows(name) if "loss" in row]

    def _overrides(self, name: str, *more: str) -> list[str]:
        return [f"training.output_dir={self.folder / name}", *self._common, *more]

    def _rows(self, name: str, number: int | None) -> Path:
        """The first rows of a file of the quickstart; None: all."""
        lines = (bundled_recipes_dir() / "quickstart" / f"{name}.jsonl").read_text().splitlines()
        file = self.folder / f"{name}.jsonl"
        file.write_text("\n".join(lines[:number]) + "\n")
        return file


def measure(arguments: dict[str, Any]) -> dict[str, Any]:
    """arguments: work; num_steps; kill_at: a step; num_train_rows (None: all), num_eval_rows; overrides:
    further ones of the recipe; launcher: of modules in processes of their own, on the same device."""
    smoke = Smoke(arguments)
    in_fp32 = "model.compute_dtype=float32"
    on_the_cpu = smoke.start("cpu", in_fp32, launcher=PLAINLY, **ON_THE_CPU)
    try:
        smoke.check("train", lambda: smoke.train("train", "training.deterministic=true"))
        smoke.check("resume", smoke.resume)
        smoke.check("float32", lambda: smoke.train("float32", in_fp32, "memory.weights=ram"))
        smoke.check("losses", lambda: smoke.compare_losses("train", on_the_cpu))
        smoke.check("losses, float32", lambda: smoke.compare_losses("float32", on_the_cpu))
    finally:
        on_the_cpu.kill()
        on_the_cpu.wait()
    smoke.check("generate", lambda: smoke.generate(smoke.folder / "float32"))
    smoke.check("export", lambda: smoke.export(smoke.folder / "train"))
    return {"runs": smoke.runs, "remarks": smoke.remarks, "problems": smoke.problems}


if __name__ == "__main__":
    answer(measure)
