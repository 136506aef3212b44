"""Plans against the resident memory of a process: no meter looks on."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
from tiny_runs import PROJECT, child_environment, recipe_values, write_base, write_recipe, write_rows

WALKS = """
import ctypes, gc, json, os, sys
from dataclasses import replace
import psutil, torch
from layer_meter import cpu_model, workload_for
from tiny_models import packed_row, tiny_config
from test_planned_layers import peak_of_plan
from qlora_train.weights.execution_plan import ActivationPolicy, everything_resident
from qlora_train.device.process_peak import process_peak_bytes, reset_process_peak
from qlora_train.walk.layer_walk import LayerWalk

torch.set_num_threads(1)

def walk(policies, number):
    sizes = {"hidden_size": 768, "intermediate_size": 2048}
    heads = {"num_attention_heads": 12, "num_key_value_heads": 4}
    config = tiny_config("llama", **sizes, **heads, num_hidden_layers=4, max_position_embeddings=2048)
    documents = (512, 300, 212)
    work = workload_for(config, documents=documents, num_micro_batches=number, num_supervised=1000)
    plan = replace(everything_resident(4), activations=tuple(map(ActivationPolicy, policies)))
    planned = peak_of_plan(work, plan)
    decoder, factors = cpu_model(work)
    for weight in decoder.weights.quantized.values():
        for tensor in weight.tensors.values():
            tensor.fill_(0.01)  # else zeros are pages that are not there
    tokens = [packed_row(list(documents), seed=k) for k in range(number)]
    walk = LayerWalk(decoder, factors, plan, reference=False)
    walk.accumulate(tokens, seed=0, step=1, num_supervised=100)
    gc.collect()
    ctypes.CDLL("libc.so.6").malloc_trim(0)
    before = psutil.Process().memory_info().rss
    reset_process_peak()
    walk.accumulate(tokens, seed=0, step=2, num_supervised=100)
    print(planned, process_peak_bytes() - before, flush=True)

torch.set_num_threads(1)
for policies, number in json.loads(sys.argv[1]):
    child = os.fork()  # each walk in a process of its own; what all import is imported once
    if child == 0:
        walk(policies, number)
        os._exit(0)
    assert os.waitpid(child, 0)[1] == 0, policies
"""
KEEP, RECOMPUTE, OFFLOAD = "keep", "recompute", "offload"


POLICIES = {
    "keep": ((KEEP,) * 4, 1),
    "recompute": ((RECOMPUTE,) * 4, 2),
    "offload": ((OFFLOAD,) * 4, 2),
    "mixed": ((RECOMPUTE, RECOMPUTE, KEEP, KEEP), 2),
}
"""name -> activations of each layer, number of micro-batches"""


@pytest.mark.skipif(sys.platform != "linux", reason="reads the process's peak from Linux")
def test_walks_take_what_is_planned() -> None:
    """Large tensors are given back to the system at once, so that what is resident is what is alive."""
    threshold = str(2**16)
    environment = child_environment(
        MALLOC_MMAP_THRESHOLD_=threshold, MALLOC_TRIM_THRESHOLD_=threshold, OMP_NUM_THREADS="1"
    )
    environment["PYTHONPATH"] += f":{PROJECT / 'tests'}:{PROJECT / 'tests' / 'plan'}"
    command = [sys.executable, "-c", WALKS, json.dumps(list(POLICIES.values()))]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    rest_bytes = 2 * 2**20  # Python's own objects
    for name, line in zip(POLICIES, done.stdout.splitlines(), strict=True):
        planned, measured = map(int, line.split())
        print(f"{name}: planned {planned:,}, resident {measured:,}: {planned / measured - 1:+.1%}")
        assert 0.98 * (measured - rest_bytes) < planned < 1.05 * measured, name


RUN = """
import json, sys
from qlora_train.device.process_peak import process_peak_bytes, reset_process_peak
from qlora_train.recipe import load_recipe
from qlora_train.train import train

reset_process_peak()
train(load_recipe(sys.argv[1]))
with open(sys.argv[2]) as file:
    print(json.load(file)["peak_ram_bytes"], process_peak_bytes())
"""


@pytest.mark.skipif(sys.platform != "linux", reason="reads the process's peak from Linux")
@pytest.mark.parametrize("activations", ["keep", "recompute"])
def test_a_run_takes_the_ram_that_is_planned(tmp_path: Path, activations: str) -> None:
    """The whole process: Python, libraries, data, loading, steps, saving."""
    sizes = {
        "hidden_size": 512,
        "intermediate_size": 1408,
        "num_attention_heads": 8,
        "num_key_value_heads": 2,
    }
    base = write_base(tmp_path / "base", **sizes, num_hidden_layers=6, max_position_embeddings=1024)
    rows = write_rows(tmp_path / "rows.jsonl", ({"text": f"{i:03d}" * 165} for i in range(12)))
    values = recipe_values(
        base,
        rows,
        tmp_path / "run",
        data={"sequence_length": 512},
        training={"max_steps": 3, "micro_batch_size": 4, "gradient_accumulation_steps": 1},
    )
    recipe = write_recipe(tmp_path / "recipe.yaml", values | {"memory": {"activations": activations}})
    command = [sys.executable, "-c", RUN, str(recipe), str(tmp_path / "run" / "plan.json")]
    done = subprocess.run(command, env=child_environment(), capture_output=True, text=True, check=True)
    planned, measured = map(int, done.stdout.splitlines()[-1].split())
    print(f"planned {planned:,}, resident {measured:,}: {planned / measured - 1:+.1%}")
    assert planned == pytest.approx(measured, rel=0.1)
