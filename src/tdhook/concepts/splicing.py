"""Splicing: what is put behind a module, so that its output passes the features of a dictionary."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from tdhook.models.entries import is_batch
from tdhook.tape.restoring import restored

__all__ = ["Features", "Place", "Reconstruction"]


class _Dictionary(Protocol):
    @property
    def encode(self) -> Callable[[Tensor], Tensor]:
        """``[..., width] -> [..., features]``."""

    @property
    def decode(self) -> Callable[[Tensor], Tensor]:
        """``[..., features] -> [..., width]``."""


class Features(nn.Module):
    """Encodes, along an axis.

    Args:
        path: of the module behind which it stands, for messages.
        dictionary: the dictionary, of which it holds the modules.

    Attributes:
        last: what it returned, while :class:`Reconstruction` needs it.
    """

    def __init__(self, path: str, dictionary: _Dictionary) -> None:
        super().__init__()
        self.path, self.dictionary = path, dictionary
        self.last: Tensor | None = None

    def forward(self, h: Tensor, axis: int) -> Tensor:
        """``h`` with its width along ``axis`` in features: ``[..., features, ...]``."""
        moved = _moved(h, axis, -1)
        dtype = self._dtype()
        if dtype is not None and dtype is not moved.dtype:
            moved = moved.to(dtype)
        try:
            found: object = self.dictionary.encode(moved)
        except torch.OutOfMemoryError:
            raise
        except RuntimeError as error:
            if "shape" not in str(error) and "size" not in str(error):
                raise
            raise ValueError(
                f"the dictionary at {self.path!r} does not encode {moved.shape[-1]} values, the width of "
                f"{list(h.shape)} along axis {axis}: {error}"
            ) from error
        if not isinstance(found, Tensor) or found.shape[:-1] != moved.shape[:-1]:
            raise ValueError(
                f"the dictionary at {self.path!r} encodes {list(moved.shape)} as {_shown(found)}: one tensor of shape "
                f"{[*moved.shape[:-1], 'features']} is what it should return"
            )
        self.last = features = _moved(found, -1, axis)
        return features

    def _dtype(self) -> torch.dtype | None:
        """The precision of the dictionary, if it has one: it may be another than the model's."""
        for x in (*self.parameters(), *self.buffers()):
            if x.is_floating_point():
                return x.dtype
        return None


class Reconstruction(nn.Module):
    """Decodes, and goes on with what was encoded.

    Args:
        path: of the module behind which it stands, for messages.
        dictionary: the dictionary, whose modules :class:`Features` holds.
    """

    def __init__(self, path: str, dictionary: _Dictionary) -> None:
        super().__init__()
        self.path = path
        self.__dict__["_dictionary"] = dictionary

    def forward(self, features: Tensor, h: Tensor, axis: int, before: Tensor) -> Tensor:
        """``h`` itself where the features are what it was encoded as; else also what they decode to differently.

        Args:
            features: ``[..., features, ...]``, along ``axis``.
            h: ``[..., width, ...]``, likewise.
            axis: which.
            before: the features that ``h`` was encoded as.
        """
        made = self._decoded(features, h, axis)
        if features is before:
            return restored(made, h.detach())
        with torch.no_grad():
            unchanged = (features == before).all(axis, keepdim=True)
            other = h + (made - self._decoded(before, h, axis))
            value = torch.where(unchanged, h, other)
        return restored(made, value)

    def _decoded(self, features: Tensor, h: Tensor, axis: int) -> Tensor:
        made: object = self.__dict__["_dictionary"].decode(_moved(features, axis, -1))
        wanted = _moved(h, axis, -1).shape
        if not isinstance(made, Tensor) or made.shape != wanted:
            raise ValueError(
                f"the dictionary at {self.path!r} decodes to {_shown(made)}, and {list(wanted)} was encoded"
            )
        back = _moved(made, -1, axis)
        return back if back.dtype is h.dtype else back.to(h.dtype)


@dataclass(frozen=True)
class Place:
    """Where a dictionary is spliced in.

    Attributes:
        path: of the module behind which it stands.
        host: that module.
        features: encodes, and ``reconstruction``: decodes.
        axis: which axis of the output is encoded.
        element: which element of the output is, where there are several.
    """

    path: str
    host: nn.Module
    features: Features
    reconstruction: Reconstruction
    axis: int | None
    element: int | str | None

    def hook(self, batch: Sequence[int], met: set[str]) -> Callable[..., object]:
        """What replaces the output of the module.

        Args:
            batch: the batch size with which the model is run.
            met: told the path when that happened.
        """

        def behind(module: nn.Module, args: object, output: Any) -> object:
            met.add(self.path)
            h = self._chosen(output)
            axis = self._axis(h, batch)
            try:
                features = self.features(h, axis)
                value = self.reconstruction(features, h, axis, self.features.last)
            finally:
                self.features.last = None
            return self._put(output, value)

        return behind

    def _chosen(self, output: Any) -> Tensor:
        """The tensor that is encoded."""
        found = output
        if self.element is not None:
            try:
                found = output[self.element]
            except (KeyError, IndexError, TypeError) as error:
                raise ValueError(
                    f"the module {self.path!r} returns {_shown(output)}, which has no element {self.element!r}"
                ) from error
        elif isinstance(output, tuple | list | dict) or is_batch(output):
            raise ValueError(
                f"the module {self.path!r} returns {_shown(output)}: say which element is encoded, element="
            )
        if not isinstance(found, Tensor) or not found.is_floating_point():
            raise TypeError(
                f"what is encoded at {self.path!r} is {_shown(found)}, and no floating-point tensor"
            )
        return found

    def _put(self, output: Any, value: Tensor) -> Any:
        """The output with another tensor in the place of the one that was encoded."""
        if self.element is None:
            return value
        if is_batch(output):
            output.set(self.element, value)
            return output
        if isinstance(output, tuple):
            assert isinstance(self.element, int)
            elements = list(output)
            elements[self.element] = value
            return type(output)(*elements) if hasattr(output, "_fields") else tuple(elements)
        made = copy.copy(output)
        made[self.element] = value
        return made

    def _axis(self, h: Tensor, batch: Sequence[int]) -> int:
        """Which axis is encoded, counted from the end."""
        lead = len(batch) if h.shape[: len(batch)] == torch.Size(batch) else 1
        if self.axis is None:
            if h.dim() - lead != 1:
                raise ValueError(
                    f"the output of {self.path!r} is of shape {list(h.shape)}, of which {lead} are axes of the batch: "
                    "say which axis is encoded, axis=-1 for the last"
                )
            return -1
        axis = self.axis if self.axis < 0 else self.axis - 1 + lead - h.dim()
        if not lead - h.dim() <= axis < 0:
            raise ValueError(
                f"axis={self.axis} is none of the features of {self.path!r}, whose output is of shape "
                f"{list(h.shape)}, of which {lead} are axes of the batch"
            )
        return axis


def _moved(x: Tensor, start: int, end: int) -> Tensor:
    return x if start == end else x.movedim(start, end)


def _shown(value: object) -> str:
    if isinstance(value, Tensor):
        return f"a tensor of shape {list(value.shape)}"
    if isinstance(value, tuple | list):
        return f"{type(value).__name__} of {len(value)}"
    if isinstance(value, dict):
        return f"{type(value).__name__} with {', '.join(map(repr, value))}"
    return type(value).__name__
