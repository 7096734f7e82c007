"""Activation maps: what a layer saw and where, weighted by the gradient there, in the size of the input."""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from tensordict import TensorDictBase
from tensordict.utils import NestedKey
from torch import Tensor

from tdhook.contexts.attribution import Attribution, Shared
from tdhook.passes.forward import Run
from tdhook.passes.runner import Runner
from tdhook.targets import TargetLike

if TYPE_CHECKING:
    from typing_extensions import Unpack

__all__ = ["ActivationMap"]


class ActivationMap(Attribution):
    """What all activation maps share.

    Under ``("attr", layer)`` is written what each unit of the layer contributes, of the layer's shape. Under
    ``("attr", key)``, for each attributed input that has the axes of the map, is the sum over the layer's channels,
    resized to the input, the same along its other axes. Other inputs get none.

    Args:
        layer: path of the module whose output is looked at.
        target: what is explained (:mod:`tdhook.targets`); by default the only output there is.
        channel: which axis of the layer's features are its channels: ``0`` for ``[channels, height, width]``, ``-1``
            for ``[tokens, channels]``. The others are those of the map.
        grid: how tokens lie, ``(rows, columns)``, line by line.
        skip: tokens before those of the map, a class token say; they contribute nothing.
        axes: those of an input that the map goes along, counted from the end; by default its last.
        relu: whether what speaks against the target is left out of the map, as in the papers.
        smooth: whether the map is resized by interpolation, or each of its values covers a rectangle.
        **options: those of :class:`~tdhook.contexts.attribution.Attribution`: ``attribute``, ``attribution_key``, ...

    Raises:
        ValueError: ``input_modules`` names another layer; or, when it is called: no input has the axes of the map, the
            layer was called several times, it has other axes, or one more than inputs, of size one, where the batch has
            none.
    """

    def __init__(
        self,
        layer: str,
        target: TargetLike = None,
        *,
        channel: int = 0,
        grid: tuple[int, int] | None = None,
        skip: int = 0,
        axes: Sequence[int] | None = None,
        relu: bool = True,
        smooth: bool = True,
        **options: Unpack[Shared],
    ) -> None:
        others = [path for path in options.get("input_modules") or () if path != layer]
        if others:
            raise ValueError(
                f"an activation map is of one layer, {layer!r}, and gives {others[0]!r} no relevance: leave out "
                "input_modules, or give that layer a map of its own"
            )
        options["input_modules"] = [layer]
        super().__init__(target, **options)
        self.layer, self.channel, self.grid, self.skip = layer, channel, grid, skip
        self.axes, self.relu, self.smooth = axes, relu, smooth

    @abstractmethod
    def weighed(self, gradient: Tensor, value: Tensor) -> Tensor:
        """What each unit contributes.

        Args:
            gradient: of the target, ``[*batch, channels, places]`` or ``[outputs, *batch, channels, places]``.
            value: of the layer, ``[*batch, channels, places]``.

        Returns:
            Of the shape of the gradient.
        """

    def explain(self, runner: Runner, td: TensorDictBase) -> Mapping[NestedKey, Tensor]:
        """One forward pass, one backward pass as far as the layer."""
        with runner.forward(td) as run:
            key, sources = self._key(run), run.sources()
            gradient = run.pull(run.seeds(self.seeder), {key: sources[key]})[key]
            inputs = [name for name in sources if name != key]
            value, lead = sources[key].detach(), run.batch_dims([key])[key]
            if not lead:
                self._require_no_batch_of_one(run, value)
        after = gradient.dim() - value.dim()
        value, shape = self._places(value, lead)
        units = self.weighed(self._places(gradient, lead + after)[0], value)
        seen = units.sum(-2).clamp(min=0) if self.relu else units.sum(-2)
        seen = seen.reshape((*seen.shape[:-1], *(self.grid or shape)))
        seen = run.shaped(seen, of=sources[key], after=bool(after))
        axes = self._along(len(self.grid or shape))
        resized = {
            name: self._resized(seen, sources[name].shape[run.td.batch_dims :], axes) for name in inputs
        }
        found = {name: x for name, x in resized.items() if x is not None}
        if inputs and not found:
            shapes = ", ".join(
                f"{name!r} {list(sources[name].shape[run.td.batch_dims :])}" for name in inputs
            )
            raise ValueError(
                f"no input ({shapes}) has the axes {axes} of the map of {self.layer!r}: say which it goes along by "
                "axes, or leave inputs out by use_inputs=False"
            )
        return {key: self._as_layer(units, gradient, lead + after), **found}

    def _key(self, run: Run) -> NestedKey:
        keys = [key for key in run.sources() if key not in run.inputs]
        if len(keys) != 1:
            raise ValueError(
                f"the layer {self.layer!r} was called {len(keys)} times; name a module that is called once"
            )
        return keys[0]

    def _require_no_batch_of_one(self, run: Run, value: Tensor) -> None:
        """See that the first axis of the layer is none that the model puts before its input, as a batch of one."""
        given = [run.td.get(key, None) for key in run.setup.in_keys]
        axes = max((x.dim() for x in given if isinstance(x, Tensor)), default=0)
        if self.channel < 1 and value.dim() > max(axes, 2) and value.shape[0] == 1:
            raise ValueError(
                f"the layer {self.layer!r} has the axes {list(value.shape)} where the batch has none, so that the "
                "first may be a batch of one that the model makes itself, and which axes are those of the map is not "
                "known: explain a batch of one, td.unsqueeze(0)"
            )

    def _places(self, x: Tensor, lead: int) -> tuple[Tensor, tuple[int, ...]]:
        """A value of the layer as ``[..., channels, places]``, and the axes of the map."""
        features = x.dim() - lead
        if features < 2 or not -features <= self.channel < features:
            raise ValueError(
                f"the layer {self.layer!r} has the axes {list(x.shape[lead:])}, and a map needs that of channels, "
                f"channel={self.channel}, and others"
            )
        x = x.movedim(lead + self.channel % features, lead)
        places = x.flatten(lead + 1)[..., self.skip :]
        shape = tuple(x.shape[lead + 1 :]) if not self.skip else (places.shape[-1],)
        if self.grid is not None and math.prod(self.grid) != places.shape[-1]:
            raise ValueError(
                f"the layer {self.layer!r} has {places.shape[-1]} places after the {self.skip} that are skipped, which "
                f"make no grid of {self.grid}"
            )
        return places, shape

    def _as_layer(self, units: Tensor, like: Tensor, lead: int) -> Tensor:
        """Contributions ``[..., channels, places]`` in the layer's own axes, none of what was skipped."""
        moved = like.movedim(lead + self.channel % (like.dim() - lead), lead)
        whole = F.pad(units, (self.skip, 0)).reshape(moved.shape)
        return whole.movedim(lead, lead + self.channel % (like.dim() - lead))

    def _along(self, count: int) -> tuple[int, ...]:
        """The axes of an input that a map of so many goes along."""
        axes = tuple(range(-count, 0)) if self.axes is None else tuple(sorted(self.axes))
        if len(set(axes)) != count or len(axes) != count or max(axes) >= 0:
            raise ValueError(
                f"the map of {self.layer!r} has {count} axes, and axes={self.axes} names others of inputs"
            )
        return axes

    def _resized(self, seen: Tensor, shape: torch.Size, axes: tuple[int, ...]) -> Tensor | None:
        """The map ``[..., *map]`` as relevance ``[..., *shape]`` of features that have its axes; else ``None``."""
        count = len(axes)
        if len(shape) < -axes[0]:
            return None
        size = [shape[axis] for axis in axes]
        how = {"mode": ("linear", "bilinear", "trilinear")[count - 1], "align_corners": False}
        batch = seen.shape[: seen.dim() - count]
        flat = seen.reshape(-1, 1, *seen.shape[len(batch) :])
        large = F.interpolate(flat, size, **(how if self.smooth else {"mode": "nearest"}))
        ones = [shape[axis] if axis in axes else 1 for axis in range(-len(shape), 0)]
        return large.reshape((*batch, *ones)).expand((*batch, *shape)).clone()
