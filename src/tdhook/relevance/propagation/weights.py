"""Modified weights, made once and kept until the parameters that they were made of change."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from tdhook.tape.internals import version_of

__all__ = ["WeightCache"]

_PLAIN = (Tensor, nn.Parameter, nn.Buffer)
# To look whether a small weight is still the same takes as long as to make what is made of it.
_SMALL = 1 << 16
_SAMPLED = 1024


class WeightCache:
    """Keeps one tensor for each layer and modification.

    Whether a parameter changed is told by its version, its memory, and a sample of its values, since neither writes
    through ``.data`` nor those of another process raise the version. Weights of up to 65 536 elements are not kept, nor
    are those on a GPU, where modifying is cheap and looking is not.
    """

    def __init__(self) -> None:
        self._kept: WeakKeyDictionary[nn.Module, dict[Hashable, _Kept]] = WeakKeyDictionary()

    def __reduce__(self) -> tuple[object, ...]:
        return WeightCache, ()

    def get(
        self, layer: nn.Module, change: Hashable, sources: Sequence[Tensor], make: Callable[[], Tensor]
    ) -> Tensor:
        """What ``make`` makes of ``sources``, the first of which is the weight of ``layer``."""
        weight = sources[0]
        if weight.numel() <= _SMALL or not all(type(x) in _PLAIN and x.is_cpu for x in sources):
            return make()
        if any(x.is_inference() for x in sources):
            return make()
        kept = self._kept.setdefault(layer, {})
        found = kept.get(change)
        if found is None or not found.made_of(sources):
            found = kept[change] = _Kept(sources, make())
        return found.value


class _Kept:
    """A tensor, and what tells whether it is still the right one."""

    def __init__(self, sources: Sequence[Tensor], value: Tensor) -> None:
        self.value = value
        # The memory is held, lest other values come to lie at the same address.
        self._sources = [x.detach() for x in sources]
        self._states = [_state(x) for x in sources]
        self._samples = [_sample(x).clone() for x in sources]

    def made_of(self, sources: Sequence[Tensor]) -> bool:
        """Whether nothing changed since."""
        return [_state(x) for x in sources] == self._states and all(
            torch.equal(_sample(x), sample) for x, sample in zip(sources, self._samples, strict=True)
        )


def _state(x: Tensor) -> tuple[object, ...]:
    return version_of(x), x.data_ptr(), x.dtype, x.shape, x.stride()


def _sample(x: Tensor) -> Tensor:
    values = x.detach().flatten()
    return values[:: -(-len(values) // _SAMPLED)]
