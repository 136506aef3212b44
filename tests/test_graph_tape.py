"""The tape that stands for CUDA graphs in tests: fixed addresses, nothing done during a capture."""

from __future__ import annotations

import pytest
import torch
from graph_tape import TapeRecorder
from torch import Tensor


def test_a_replay_reads_and_writes_the_addresses_of_the_capture() -> None:
    x, total, outside = torch.ones(4), torch.zeros(2), torch.full((2,), 5.0)
    holder: dict[str, Tensor] = {"outside": outside}
    made: list[Tensor] = []

    def work() -> None:
        view = x.view(2, 2).t()  # a view, an operation in place on a view, and sums into what was there
        product = view * holder["outside"]
        product[0].add_(1.0)
        made.append(product)
        total.add_(product.sum(0))

    replay = TapeRecorder().capture(work)
    assert torch.equal(total, torch.zeros(2)) and torch.isnan(made[0]).all()
    x.copy_(torch.tensor([1.0, 2.0, 3.0, 4.0]))
    holder["outside"] = torch.zeros(2)  # another tensor in its place: not seen
    for count in (1, 2):
        replay()
        expected = torch.tensor([[1.0, 3.0], [2.0, 4.0]]) * 5.0 + torch.tensor([[1.0], [0.0]])
        assert torch.equal(made[0], expected)
        assert torch.equal(total, count * expected.sum(0))
    outside.fill_(1.0)
    replay()
    assert torch.equal(made[0], torch.tensor([[2.0, 4.0], [2.0, 4.0]]))


def test_backward_is_on_the_tape_too() -> None:
    x, direction, gradient = torch.zeros(3), torch.ones(3), torch.zeros(3)
    graph: list[Tensor] = []

    def forward() -> None:
        leaf = x.clone().requires_grad_()
        graph.extend([leaf, (leaf * leaf).exp()])

    def backward() -> None:
        leaf, y = graph
        y.backward(direction)
        assert leaf.grad is not None
        gradient.add_(leaf.grad)

    recorder = TapeRecorder()
    replays = [recorder.capture(forward), recorder.capture(backward)]
    assert torch.equal(gradient, torch.zeros(3))
    x.copy_(torch.tensor([0.5, 1.0, -1.0]))
    direction.copy_(torch.tensor([1.0, 2.0, 3.0]))
    for replay in replays:
        replay()
    torch.testing.assert_close(gradient, direction * 2 * x * (x * x).exp())


def test_waiting_for_the_device_cannot_be_captured() -> None:
    x = torch.ones(3)
    with pytest.raises(AssertionError, match="waits for the device"):
        TapeRecorder().capture(lambda: x.sum().item())  # type: ignore[arg-type, return-value]
