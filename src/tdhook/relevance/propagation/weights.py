"""Modified weights, made once and kept until the parameters that they were made of change."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable, Sequence
from weakref import WeakKeyDictionary, WeakSet

from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from tdhook.tape.internals import is_plain, parameters_of
from tdhook.tape.unchanged import Unchanged

__all__ = ["WeightCache"]

_PLAIN = (Tensor, nn.Parameter, nn.Buffer)
# To look whether a small weight is still the same takes as long as to make what is made of it.
_SMALL = 1 << 16


class WeightCache:
    """Keeps one tensor for each layer and modification.

    Whether a parameter changed is told by its version, its memory, and sums of its values, since neither writes through
    ``.data`` nor those of another process raise the version. Weights of up to 65 536 elements are not kept, nor
    are those on a GPU, where modifying is cheap and looking is not. Nor is anything of weights that a layer is only
    lent while it runs, as where parameters are sharded or offloaded: what is kept would be a copy of the whole model.

    Args:
        layers: those whose weights may be modified.

    Attributes:
        keeps_none: whether all of these are small.
    """

    def __init__(self, layers: Iterable[nn.Module] = ()) -> None:
        self._layers: WeakSet[nn.Module] = WeakSet(layer for layer in layers if _may_be_large(layer))
        self.keeps_none = len(self._layers) == 0
        self._own: dict[int, Tensor] = {}
        self._kept: WeakKeyDictionary[nn.Module, dict[Hashable, _Kept]] = WeakKeyDictionary()

    def __reduce__(self) -> tuple[object, ...]:
        return WeightCache, (tuple(self._layers),)

    def begin(self) -> None:
        """Look what the layers hold while nothing runs; what was made of anything else is kept no longer."""
        self._own = {
            id(layer): weight for layer in self._layers if (weight := _own_weight(layer)) is not None
        }
        for layer in [layer for layer in self._kept if id(layer) not in self._own]:
            del self._kept[layer]

    def end(self) -> None:
        """Hold on to no weights between passes but those that something was made of."""
        self._own = {}

    def get(
        self, layer: nn.Module, change: Hashable, sources: Sequence[Tensor], make: Callable[[], Tensor]
    ) -> Tensor:
        """What ``make`` makes of ``sources``, the first of which is the weight of ``layer``."""
        own = self._own.get(id(layer))
        if own is None or own.data_ptr() != sources[0].data_ptr():
            return make()
        if not all(type(x) in _PLAIN and x.is_cpu for x in sources) or any(x.is_inference() for x in sources):
            return make()
        kept = self._kept.setdefault(layer, {})
        found = kept.get(change)
        if found is None or not found.made_of(sources):
            found = kept[change] = _Kept(sources, make())
        return found.value


def _may_be_large(layer: nn.Module) -> bool:
    weight: Tensor | None = parameters_of(layer).get("weight")
    if weight is None:
        return False
    unmade: bool = is_lazy(weight)
    return unmade or weight.numel() > _SMALL


def _own_weight(layer: nn.Module) -> Tensor | None:
    """The weight of a layer, if it is a large one that lies in memory, whole."""
    weight = parameters_of(layer).get("weight")
    if weight is None or type(weight) not in _PLAIN or not is_plain(weight):
        return None
    if not weight.is_cpu or weight.numel() <= _SMALL:
        return None
    return weight if weight.untyped_storage().size() else None


class _Kept:
    """A tensor, and what tells whether it is still the right one."""

    def __init__(self, sources: Sequence[Tensor], value: Tensor) -> None:
        self.value = value
        self._sources = [Unchanged(x) for x in sources]

    def made_of(self, sources: Sequence[Tensor]) -> bool:
        """Whether nothing changed since."""
        return len(sources) == len(self._sources) and all(
            before.is_of(x) for before, x in zip(self._sources, sources, strict=True)
        )
