"""The planned time of a step counts what experts and long documents cost besides their FLOPs."""

from __future__ import annotations

from dataclasses import replace

import pytest
from plan.test_planner import GPU, RATES, planned, recipe

from qlora_train.plan.model_shape import known_shape
from qlora_train.plan.time_model import step_time
from qlora_train.plan.workload import workload_of
from qlora_train.weights.execution_plan import ActivationPolicy


@pytest.mark.parametrize("is_adapted", [False, True])
def test_each_expert_multiplies_rows_of_a_number_of_its_own(is_adapted: bool) -> None:
    """Two products forward and three backward for each of 128 experts in 48 layers; with A and B of both
    matrices six and fifteen."""
    shape = known_shape("qwen3-30b-a3b")
    assert shape is not None
    workload = workload_of(recipe("Qwen/Qwen3-30B-A3B"), shape, GPU)
    if is_adapted:
        workload = replace(workload, lora_ranks=tuple((path, 16) for path in shape.expert_shapes))
    plan = planned(80, "Qwen/Qwen3-30B-A3B").execution
    free, fixed = (
        step_time(workload, plan, replace(RATES, expert_product_seconds=seconds)).total_seconds
        for seconds in (0.0, 1.0)
    )
    assert fixed - free == pytest.approx(4 * 48 * 128 * (21 if is_adapted else 5))
    one_token = replace(workload, documents=(1,))  # goes through 8 experts
    free, fixed = (
        step_time(one_token, plan, replace(RATES, expert_product_seconds=seconds)).total_seconds
        for seconds in (0.0, 1.0)
    )
    assert fixed - free == pytest.approx(4 * 48 * 8 * (21 if is_adapted else 5))


def test_experts_multiply_by_their_first_matrices_again_in_backward() -> None:
    """Kept or recomputed, as they save nothing but their input."""
    shape = known_shape("qwen3-30b-a3b")
    assert shape is not None
    workload = replace(workload_of(recipe("Qwen/Qwen3-30B-A3B"), shape, GPU), lora_ranks=())
    kept = replace(planned(80, "Qwen/Qwen3-30B-A3B").execution, activations=(ActivationPolicy.KEEP,) * 48)
    recomputed = replace(kept, activations=(ActivationPolicy.RECOMPUTE,) * 48)
    kept_flops, recomputed_flops = (step_time(workload, plan, RATES).flops for plan in (kept, recomputed))
    tokens = workload.tokens_per_step
    attention = tokens * 48 * 2 * 2048 * shape.q_width  # forward again
    linears = tokens * 48 * 2 * shape.linear_parameters
    assert recomputed_flops - kept_flops == pytest.approx(attention + linears, rel=0.01)


def test_long_documents_have_a_rate_of_attention_of_their_own() -> None:
    shape = known_shape("llama-3.1-8b")
    assert shape is not None
    workload = workload_of(recipe(), shape, GPU)
    plan = planned(80).execution
    rates = (RATES, replace(RATES, long_attention=RATES.attention / 2))
    for documents, is_slower in (((2048,), True), ((512,) * 4, False)):
        usual, slow = (
            step_time(replace(workload, documents=documents), plan, one).total_seconds for one in rates
        )
        assert (slow > 1.01 * usual) == is_slower
