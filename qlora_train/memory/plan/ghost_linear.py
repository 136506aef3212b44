"""A decoder layer's linears with ghost tensors: model/linear.py and model/shared_input.py, statement by
statement. See ghost.py for why."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from qlora_train.memory.plan import ghost_ops as op
from qlora_train.memory.plan.ghost import Ghost, Ledger, Node, apply
from qlora_train.memory.plan.layer_settings import LayerSettings

UNPACKING = "unpacking one weight"


class GhostLinears:
    """skips_tail: the value of the last linear is not wanted now."""

    def __init__(self, ledger: Ledger, settings: LayerSettings) -> None:
        self._ledger, self._settings = ledger, settings
        self._shapes = settings.shape.linear_shapes()
        self._held: set[str] = set()
        self.skips_tail = False

    def close(self) -> None:
        """End of a visit: what was held unpacked goes."""
        self._held.clear()

    def tail_placeholder(self, x: Ghost) -> Ghost:
        """zeros(()).expand(...): a value that nobody looks at."""
        one = self._ledger.tensor((), x.itemsize)
        return Ghost(one.storage, x.shape, x.itemsize)

    def one(self, name: str, x: Ghost) -> Ghost:
        """model/linear.py, `_FrozenLinearFunction` (or, in reference mode, the formula itself)."""
        settings = self._settings
        if settings.reference:
            return self._reference_linear(name, x, name in settings.targets)
        y, h = self.forward(name, x)
        needs_dx = x.node is not None

        def run(gradient: Ghost, *saved: Ghost) -> tuple[Ghost | None, None]:
            x, h = saved or (gradient, None)
            return self.backward(name, gradient, x, h, needs_dx=needs_dx), None

        if h is None:
            return apply(y, (x,), (), run)
        return apply(y, (x, trainable(self._ledger)), (x, h), run)

    def forward(self, name: str, x: Ghost, h: Ghost | None = None) -> tuple[Ghost, Ghost | None]:
        """(y, h = x A^T; None without factors). h: where it is known."""
        settings, ledger, num_tokens, itemsize = self._settings, self._ledger, x.shape[1], x.itemsize
        num_out, _ = self._shapes[name]
        if name == settings.shape.tail_name and self.skips_tail:
            y = Ghost(ledger.tensor((), itemsize).storage, (1, num_tokens, num_out), itemsize)
        else:
            self._unpack(name)
            y = ledger.tensor((1, num_tokens, num_out), itemsize)
        if name not in settings.targets:
            return y, None
        if h is None:
            branch = self._dropped(x.detach()) if settings.dropout else x
            h = ledger.tensor((num_tokens, settings.rank), itemsize)
            del branch
        return y, h

    def backward(
        self,
        name: str,
        gradient: Ghost,
        x: Ghost,
        h: Ghost | None,
        *,
        needs_dx: bool,
        onto: Ghost | None = None,
    ) -> Ghost | None:
        """dL/dx, written into `onto` where there is one."""
        settings, ledger, num_tokens, itemsize = self._settings, self._ledger, x.shape[1], gradient.itemsize
        num_out, num_in = self._shapes[name]
        rank, dx = settings.rank, onto
        if needs_dx:
            self._unpack(name)
            dx = ledger.tensor((1, num_tokens, num_in), itemsize) if onto is None else onto
        if name not in settings.targets:
            return dx
        dh = ledger.tensor((num_tokens, rank), itemsize)
        if settings.dropout:
            op.scratch_of_dropout_mask(ledger, num_tokens, num_in)
            kept = ledger.tensor((num_tokens * num_in * (1 + itemsize),), 1)  # with the mask
            branch = ledger.tensor((num_tokens, num_in), itemsize)
        if h is None:
            h = dh.like()
        ledger.scratch(rank * (num_in + num_out) * itemsize)
        if settings.dropout and needs_dx:
            ledger.scratch(num_tokens * num_in * itemsize)
            del kept, branch
        del dh
        return dx

    def sharing(self, names: Sequence[str], x: Ghost) -> list[Ghost]:
        """model/shared_input.py, `_SharedInputFunction`: the output of each."""
        ys, hs = self.forward_of_all(names, x)
        needs_dx, gradients = x.node is not None, list[Ghost]()
        factors = (trainable(self._ledger),) if hs else ()

        def run(gradient: Ghost, *saved: Ghost) -> tuple[Ghost | None, ...]:
            """One operation: it waits for the gradients of all outputs."""
            gradients.append(gradient)
            if len(gradients) < len(names):
                return (None, None)
            x, *hs = saved or (gradient,)
            dx = self.backward_of_all(names, gradients, x, hs, needs_dx=needs_dx)
            gradients.clear()
            return dx, None

        return [apply(y, (x, *factors), (x, *hs) if hs else (), run) for y in ys]

    def forward_of_all(self, names: Sequence[str], x: Ghost) -> tuple[list[Ghost], list[Ghost]]:
        """model/shared_input.py: (every y, what is saved of x A^T)."""
        if not self._are_stacked(names):
            results = [self.forward(name, x) for name in names]
            return [y for y, _ in results], [h for _, h in results if h is not None]
        stacked = self._ledger.tensor((x.shape[1], len(names) * self._settings.rank), x.itemsize)
        return [self.forward(name, x, stacked)[0] for name in names], [stacked]

    def backward_of_all(
        self,
        names: Sequence[str],
        gradients: Sequence[Ghost],
        x: Ghost,
        hs: Sequence[Ghost],
        *,
        needs_dx: bool,
    ) -> Ghost | None:
        """dL/dx, one buffer for all."""
        dx: Ghost | None = None
        if not self._are_stacked(names):
            waiting = list(hs)
            for name, gradient in zip(names, gradients, strict=True):
                h = waiting.pop(0) if name in self._settings.targets else None
                dx = self.backward(name, gradient, x, h, needs_dx=needs_dx, onto=dx)
            return dx
        rank, itemsize, low = self._settings.rank, x.itemsize, []
        for name in names:
            num_out, num_in = self._shapes[name]
            if needs_dx:
                self._unpack(name)
                dx = self._ledger.tensor((1, x.shape[1], num_in), itemsize) if dx is None else dx
            low.append(self._ledger.tensor((rank * (x.shape[1] + num_out),), itemsize))
        dh = self._ledger.tensor((len(names) * rank, x.shape[1]), itemsize)
        self._ledger.scratch(len(names) * rank * num_in * itemsize)
        del dh, low
        return dx

    def _are_stacked(self, names: Sequence[str]) -> bool:
        return self._settings.targets.issuperset(names) and not self._settings.dropout

    def _dropped(self, x: Ghost) -> Ghost:
        """kernels/dropout.dropout."""
        op.scratch_of_dropout_mask(self._ledger, x.shape[1], x.shape[2])
        mask = self._ledger.tensor(x.shape, 1)
        factor = x.like()
        branch = self._ledger.tensor(x.shape, x.itemsize)
        del mask, factor
        return branch

    def _reference_linear(self, name: str, x: Ghost, has_factors: bool) -> Ghost:
        """F.linear, twice more for the factors: autograd saves the unpacked weight and the branch."""
        num_out, num_in = self._shapes[name]
        ledger, itemsize, rank, num_tokens = self._ledger, x.itemsize, self._settings.rank, x.shape[1]
        weight = self._unpacked_copy(name)
        value = ledger.tensor((1, num_tokens, num_out), itemsize)

        def product_run(gradient: Ghost, weight: Ghost) -> tuple[Ghost]:
            return (gradient.ledger.tensor((1, num_tokens, num_in), itemsize),)

        y = apply(value, (x,), (weight,), product_run)
        del weight, value
        if not has_factors:
            return y
        branch = self._reference_dropped(x) if self._settings.dropout else x
        factors = trainable(ledger)
        low = apply(
            ledger.tensor((1, num_tokens, rank), itemsize),
            (branch, factors),
            (branch,),
            _factor_run((1, num_tokens, num_in), (rank, num_in), itemsize),
        )
        high = apply(
            ledger.tensor((1, num_tokens, num_out), itemsize),
            (low, factors),
            (low,),
            _factor_run((1, num_tokens, rank), (num_out, rank), itemsize),
        )
        del branch, low
        return op.add(y, op.scale(high))

    def _reference_dropped(self, x: Ghost) -> Ghost:
        op.scratch_of_dropout_mask(self._ledger, x.shape[1], x.shape[2])
        mask = self._ledger.tensor(x.shape, 1)
        factor = x.like()
        result = apply(x.like(), (x,), (factor,), lambda g, saved: (g.like(),))
        del mask, factor
        return result

    def _unpack(self, name: str) -> None:
        """Into the buffer that all weights share, which the walk counts; a held one is there already."""
        if name not in self._held:
            with self._ledger.cause(UNPACKING):
                self._ledger.scratch(
                    self._settings.packing.scratch_bytes(
                        self._shapes[name], on_accelerator=self._settings.target.is_accelerator
                    )
                )
        if self._settings.hold_unpacked:
            self._held.add(name)

    def _unpacked_copy(self, name: str) -> Ghost:
        """A weight of its own, which autograd may save."""
        shape, packing = self._shapes[name], self._settings.packing
        with self._ledger.cause(UNPACKING):
            absmax = self._ledger.tensor((packing.absmax_bytes(shape[0] * shape[1]),), 1)
            weight = self._ledger.tensor(shape, packing.itemsize)
            del absmax
        return weight


def trainable(ledger: Ledger) -> Ghost:
    """Stands for A and B, which have memory of their own: they only make the graph begin."""
    empty = ledger.tensor((0,), 1)
    empty.node = Node(ledger, (), (), None)
    return empty


def _factor_run(
    input_shape: tuple[int, ...], factor_shape: tuple[int, ...], itemsize: int
) -> Callable[..., tuple[Ghost, Ghost]]:
    def run(gradient: Ghost, saved: Ghost) -> tuple[Ghost, Ghost]:
        ledger = gradient.ledger
        return ledger.tensor(input_shape, itemsize), ledger.tensor(factor_shape, itemsize)

    return run
