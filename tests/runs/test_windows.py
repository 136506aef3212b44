"""On native Windows `plan` and `preview` run to the end; what needs Linux says so before anything else.

In a process whose own modules see Windows: its name, no modules and no constants that Windows has not. The
libraries below are imported before, as on Windows they are other builds.
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

from tiny_runs import child_environment, recipe_values, write_recipe

BECOME_WINDOWS = r"""
import importlib.abc, json, mmap, os, shutil, signal, sys, types
recipe, run_dir = sys.argv[1:]

import qlora_train.data.preview, qlora_train.export.export_run, qlora_train.train.run  # the libraries below
from qlora_train.data.tokenizer import load_tokenizer
load_tokenizer(json.load(open(recipe))["model"]["base"])
for name in [name for name in sys.modules if name.partition(".")[0] == "qlora_train"]:
    del sys.modules[name]

ABSENT = {"resource", "fcntl", "pwd", "grp", "termios", "tty", "pty", "syslog", "posix"}
class Finder(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path, target=None):
        if name in ABSENT:
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)
sys.meta_path.insert(0, Finder())
for name in ABSENT:
    sys.modules.pop(name, None)
for module, words in {
    os: "preadv pwritev pread pwrite memfd_create MFD_CLOEXEC O_DIRECT O_CLOEXEC O_DIRECTORY fork killpg "
    "sched_getaffinity sched_setaffinity posix_fadvise posix_fallocate getpgid setsid uname mkfifo sysconf",
    mmap: "MAP_PRIVATE MAP_SHARED MAP_ANONYMOUS MAP_ANON PROT_READ PROT_WRITE",
    signal: "SIGKILL SIGHUP SIGUSR1 SIGUSR2 SIGALRM SIGCHLD SIGSTOP setitimer alarm pthread_sigmask",
}.items():
    for word in words.split():
        delattr(module, word)
sys.platform = "win32"
shutil._winapi = types.SimpleNamespace(NeedCurrentDirectoryForExePath=lambda command: False)

import qlora_train.data.token_cache
qlora_train.data.token_cache.LEAST_BYTES = 1
from qlora_train.cli import main
def run(*arguments):
    print(f"== {arguments[0]}", flush=True)
    print(f"== {arguments[0]}", file=sys.stderr, flush=True)
    print("exit code", main(list(arguments)), flush=True)

run("plan", recipe)
run("plan", recipe, "--vram", "8GiB", "--json")
run("preview", recipe)
kept = os.listdir(os.environ["QLORA_TRAIN_CACHE"])
assert [name for name in kept if name.startswith("tokens-") and ".partial-" not in name], kept
assert not {"qlora_train.train.run", "qlora_train.export.export_run"} & set(sys.modules)
run("train", recipe)
run("generate", run_dir, "--prompt", "a")
run("export", run_dir)
assert not {"qlora_train.train.run", "qlora_train.export.export_run"} & set(sys.modules)

import qlora_train
commands = {qlora_train.train: qlora_train.load_recipe(recipe), qlora_train.export: run_dir}
for command, argument in commands.items():
    try:
        command(argument)
    except ValueError as error:
        print("refused:", error)
"""


def test_plan_and_preview_run_and_the_rest_says_what_it_needs(
    tmp_path: Path, base: Path, train_file: Path
) -> None:
    run_dir = tmp_path / "run"
    recipe = write_recipe(tmp_path / "recipe.json", recipe_values(base, train_file, run_dir))
    command = [sys.executable, "-c", BECOME_WINDOWS, str(recipe), str(run_dir)]
    done = subprocess.run(command, env=child_environment(), capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    plan, card, preview, train, generate, export = done.stdout.split("== ")[1:]
    for output in (plan, card, preview):
        assert output.rstrip().endswith("exit code 0"), output + done.stderr
    assert "fits: " in plan.splitlines()[1]
    told = json.loads(card.removeprefix("plan\n").rpartition("exit code")[0])
    assert told["fits"] and told["vram_budget_bytes"] == 8 * 2**30 and told["device"] == "cuda"
    assert "[[" in preview and "documents" in preview
    for output in (train, generate, export):
        assert "exit code 2" in output, output
    for name in ("train", "generate", "export"):
        said = done.stderr.partition(f"== {name}\n")[2].partition("==")[0]
        assert said.startswith(f"qlora-train: {name} needs Linux or WSL2"), done.stderr
    assert done.stdout.count("refused: ") == 2 and "Traceback" not in done.stderr
    assert not run_dir.exists()
