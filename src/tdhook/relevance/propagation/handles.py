"""Handles: where what travels back to the function behind a layer is handed to the layer beside its own output.

A rule may share the difference of a linear layer and of the element-wise function behind it together. The layer is run
first, and puts a handle on the tape beside its output; the function behind it, which finds the handle by the tape, is
told to the layer, and hands over at it what arrives at its own output. What goes back by the output itself is as it is
under any other rule, and true of the values there.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import TypeAlias

from torch import Tensor

from tdhook.relevance.propagation.places import Place
from tdhook.tape.functions import Identity, turn_of, unwrapped
from tdhook.tape.origins import written_over

__all__ = ["Behind", "Elementwise", "Handle", "Handles"]

Elementwise: TypeAlias = "Callable[[Tensor], Tensor]"


class Handles:
    """The handles of one run.

    Attributes:
        used: whether any rule puts handles on the tape.
    """

    def __init__(self) -> None:
        self.used = False
        self._by_node: dict[object, Handle] = {}

    def begin(self) -> None:
        """Begin a run."""
        self._by_node.clear()

    def put(self, z: Tensor, handle: Handle) -> None:
        """Say which handle belongs to a value."""
        self._by_node[_made(z)] = handle

    def of(self, x: Tensor) -> Handle | None:
        """The handle of a value, if nothing was told there before."""
        if not self._by_node:
            return None
        found = self._by_node.get(_made(x))
        if found is None or found.behind.name is not None:
            return None
        return found if (found.at.dtype, found.at.shape) == (x.dtype, x.shape) else None

    def beside(self, z: Tensor) -> tuple[tuple[Tensor, ...], int]:
        """Where the function behind a value hands over, and sends back; nowhere if none was told to its layer.

        Returns:
            The places, and which of their axes is the first one of ``z``.
        """
        node, passed = Identity.before(unwrapped(z).grad_fn)
        found, (axis, to) = self._by_node.get(node), turn_of(passed)
        if found is None or found.behind.name is None or found.at.movedim(axis, to).shape != z.shape:
            return (), 0
        return (found.at, found.by), axis


def _made(x: Tensor) -> object:
    node = Identity.before(unwrapped(x).grad_fn)[0]
    while (written := written_over(node)) is not None:
        node = Identity.before(written)[0]
    return node


@dataclass
class Behind:
    """What is behind a layer, as far as it was told.

    Attributes:
        name: that of the function; ``None`` where there is none.
        function: what becomes of the output of the layer.
        scale: by what the output is multiplied before that, if it is.
        uniform: whether it is the same function at every place.
        added: the calls by which constants are added to the output before that.
    """

    name: str | None = None
    function: Elementwise = Tensor.detach
    scale: Tensor | None = None
    uniform: bool = True
    added: tuple[Place, ...] = ()

    def is_known(self) -> Tensor | bool:
        """Whether there is a function behind the layer, and the same one on the reference.

        A tensor where a graph is traced that cannot branch on it.
        """
        known: Tensor | bool = self.name is not None
        for place in self.added:
            same = place.is_same_beside()
            if known is False or same is False:
                return False
            known = same if known is True else known & same
        return known


@dataclass(frozen=True)
class Handle:
    """The handle of a value that a layer made.

    Attributes:
        at: where it is on the tape that is handed over what counts of the value of the function, of the shape of the
            value of the layer.
        by: likewise, what went back to the value for it.
        behind: what the layer is told.
        through: what became of the output of the layer until there, if anything, and ``scale``: by what it was
            multiplied.
        added: the calls by which constants were added to it.
    """

    at: Tensor
    by: Tensor
    behind: Behind
    through: Elementwise | None = None
    scale: Tensor | None = None
    added: tuple[Place, ...] = ()

    def tell(self, name: str, function: Elementwise) -> tuple[Tensor, Tensor]:
        """Tell the layer what is behind it; returns where that hands over what arrives, and what it sends back."""
        through, behind = self.through, self.behind
        behind.name, behind.function = name, function
        behind.uniform = name not in _BY_CHANNEL
        if through is not None:
            behind.name, behind.scale, behind.uniform = "", self.scale, False
            behind.added = self.added
            behind.function = lambda z: function(through(z))
        return self.at, self.by

    def behind_of(
        self, through: Elementwise, scale: Tensor | None = None, added: Place | None = None
    ) -> Handle:
        """The handle of what is multiplied by ``scale``, and moved by something."""
        before, known = self.through, self.scale
        if known is not None:
            scale = known if scale is None else scale * known
        return replace(
            self,
            through=through if before is None else lambda z: through(before(z)),
            scale=scale,
            added=self.added if added is None else (*self.added, added),
        )


_BY_CHANNEL = frozenset(("PReLU", "prelu"))
