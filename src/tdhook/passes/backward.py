"""The backward pass of an explanation: one for a single target, or one for as many of several as fit into memory."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TypeAlias, cast

import torch
from torch import Tensor, nn
from torch.autograd.graph import GradientEdge, Node

from tdhook.tape.internals import autocasting, gradients_of, pulled_back, transformed, warn_of_loops
from tdhook.tape.layouts import lay_out
from tdhook.tape.precision import PLAIN, as_computed
from tdhook.tape.undoing import lock, undone
from tdhook.targets import Seeds

__all__ = ["End", "PullBack", "sizes_behind"]

End: TypeAlias = "Tensor | GradientEdge"
"""Where a backward pass begins or ends: at a tensor, or at a place on the tape whose tensor nobody has."""

# What comes in, what goes out, and two that a rule makes in between.
_LIVE = 4
# On a CPU, larger batches leave its caches and take longer than several smaller ones.
_BUDGET = {"cpu": 2**25}
_BUDGET_ELSEWHERE = 2**30


class PullBack:
    """Pulls seeds back to the sources of an explanation.

    Args:
        budget: bytes that the gradients of several targets may take together; by default 32 MiB on a CPU and 1 GiB
            elsewhere.
    """

    def __init__(self, budget: int | None = None) -> None:
        self.budget = budget
        self._batches = True
        # Whether there was anything to lay out on the first tape that was seen.
        self._lays_out: bool | None = None

    def __call__(self, seeds: Seeds, sources: Sequence[End], *, keep: bool = False) -> list[Tensor | None]:
        """What arrives at each source, ``None`` where nothing does; with several targets after a leading axis.

        Args:
            seeds: where the backward pass starts.
            sources: where it ends.
            keep: whether the graph is needed again.
        """
        if not seeds.handed:
            return self.between(seeds.tensors, seeds.grads, sources, seeds.several, keep=keep)
        places, handed = zip(*seeds.handed, strict=True)
        starts, grads = [*seeds.tensors, *places], [*seeds.grads, *handed]
        return self.between(starts, grads, sources, seeds.several, keep=keep)

    def between(
        self,
        starts: Sequence[End],
        grads: Sequence[Tensor],
        sources: Sequence[End],
        several: int | None,
        *,
        keep: bool = False,
    ) -> list[Tensor | None]:
        """The same from any places on the tape, with what flows into each."""
        if self._lays_out is not False and not torch.compiler.is_compiling():
            self._lays_out = lay_out(map(_node_of, starts)) or self._lays_out is True
        if autocasting():
            with as_computed(PLAIN):
                return self.between(starts, grads, sources, several, keep=keep)
        if several is None:
            return _pull(starts, sources, grads, keep=keep)
        if several == 0:
            return [x.new_empty(0, *x.shape) for x in sources if isinstance(x, Tensor)]
        size = self._at_once(starts, grads, several) if self._batches else 1
        found: list[list[Tensor | None]] = []
        start = 0
        while start < several:
            some = [grad[start : start + size] for grad in grads]
            last = start + size >= several
            try:
                found.append(self._part(starts, sources, some, keep=keep or not last))
            except torch.OutOfMemoryError:  # too many for the moment: fewer, in this call alone
                if size == 1:
                    raise
                size = (size + 1) // 2
                continue
            start += size
        if len(found) == 1:
            return found[0]
        # Whether anything reaches a source is the same for all targets; where it is not, torch refuses to join them.
        return [
            None if all(part is None for part in parts) else torch.cat(cast("list[Tensor]", list(parts)))
            for parts in zip(*found, strict=True)
        ]

    def _part(
        self, tensors: Sequence[End], sources: Sequence[End], grads: list[Tensor], *, keep: bool
    ) -> list[Tensor | None]:
        """A batched backward pass, and one for each target where there can be none.

        What torch says of a pass that cannot be batched holds for later calls too; any other error does not.
        """
        if len(grads[0]) > 1 and self._batches:
            try:
                # The graph is needed again where this fails half way.
                return _pull_batched(tensors, sources, grads, keep=True)
            except torch.OutOfMemoryError:
                raise
            except RuntimeError as error:
                self._batches = not _is_of_batching(error)
        rows = range(len(grads[0]))
        each = [
            _pull(tensors, sources, [grad[i] for grad in grads], keep=keep or i != rows[-1]) for i in rows
        ]
        return [None if row[0] is None else torch.stack(row) for row in zip(*each, strict=True)]

    def _at_once(self, starts: Sequence[End], grads: Sequence[Tensor], several: int) -> int:
        """How many targets fit into the budget, by the largest gradient on their way: a power of two, or all."""
        budget = self.budget
        if budget is None:
            budget = _BUDGET.get(grads[0].device.type, _BUDGET_ELSEWHERE)
        each = _LIVE * max(
            max(sizes_behind(starts), default=0),
            *(grad[0].numel() * grad.itemsize for grad in grads),
        )
        # By comparison alone: where a graph is traced for any batch size it then holds for a range of them.
        size = 1
        while size < several and 2 * size * each <= budget:
            size *= 2
        return min(size, several)


def _is_of_batching(error: RuntimeError) -> bool:
    """Whether torch says that a function cannot be vectorised."""
    text = str(error).lower()
    return any(word in text for word in ("vmap", "batching rule", "functorch", "batchedtensor"))


def _pull(
    tensors: Sequence[End], sources: Sequence[End], grads: Sequence[Tensor], *, keep: bool
) -> list[Tensor | None]:
    starts, ends = cast("Sequence[Tensor]", tensors), cast("Sequence[Tensor]", sources)  # either, or both
    if _fit(starts, grads) and _fit(ends, ends) and not transformed():
        return list(pulled_back(starts, grads, ends, keep=keep))
    return list(torch.autograd.grad(starts, ends, grads, retain_graph=keep, allow_unused=True))


def _fit(tensors: Sequence[Tensor], grads: Sequence[Tensor]) -> bool:
    """Whether some tensors are plain and on the tape, and others of their shapes."""
    if torch.compiler.is_compiling() or not tensors:
        return False
    for z, grad in zip(tensors, grads, strict=True):
        if type(z) is not Tensor or type(grad) is not Tensor or not z.requires_grad or z.shape != grad.shape:
            return False
    return True


def _pull_batched(
    tensors: Sequence[End], sources: Sequence[End], grads: Sequence[Tensor], *, keep: bool
) -> list[Tensor | None]:
    """One backward pass for all rows of ``grads``, vectorised."""
    reached: list[bool] = []

    def one(*row: Tensor) -> tuple[Tensor, ...]:
        pulled = _pull(tensors, sources, row, keep=keep)
        reached[:] = [grad is not None for grad in pulled]
        return tuple(grad for grad in pulled if grad is not None)

    with _without_a_word_of_loops():
        # What is computed once more, in checkpointed blocks, draws what it drew in the forward pass.
        found = iter(torch.func.vmap(one, randomness="same")(*grads))
    return [next(found) if there else None for there in reached]


_LOCK = lock()
_QUIET: set[object] = set()


@contextmanager
def _without_a_word_of_loops() -> Iterator[None]:
    """Torch loops over what it cannot vectorise (fused attention), and would warn of that, in any thread."""
    entry = object()

    def leave() -> None:
        with _LOCK:
            if {entry} >= _QUIET:
                warn_of_loops(True)
            _QUIET.discard(entry)

    with undone(leave):
        with _LOCK:
            _QUIET.add(entry)
            warn_of_loops(False)
        yield


def _node_of(z: End) -> Node | None:
    return z.grad_fn if isinstance(z, Tensor) else z.node


def sizes_behind(tensors: Sequence[End]) -> Iterator[int]:
    """Bytes of each gradient that travels through the graph of some tensors, but for those of parameters."""
    seen = set()
    ahead = [_node_of(z) for z in tensors]
    while ahead:
        node = ahead.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        if _is_of_a_parameter(node):
            continue
        for shape, dtype in gradients_of(node):
            yield math.prod(shape) * dtype.itemsize
        ahead += [before for before, _ in node.next_functions]


def _is_of_a_parameter(node: Node) -> bool:
    """Whether a node leads to a parameter alone, as the transpose of a weight does."""
    while len(node.next_functions) == 1:
        before = node.next_functions[0][0]
        if before is None:
            return False
        node = before
    return not node.next_functions and isinstance(getattr(node, "variable", None), nn.Parameter)
