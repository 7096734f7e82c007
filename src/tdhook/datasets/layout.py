"""Layout: the entries of an explained data set, and their bytes: as they are, summed up, and packed."""

from __future__ import annotations

import zlib
from collections.abc import Mapping
from itertools import pairwise

import numpy as np
import torch
from tensordict.utils import NestedKey, unravel_key
from torch import Tensor

from tdhook.datasets.identity import Plain, bytes_of
from tdhook.keys import parts_of

__all__ = ["Layout", "checksums", "name_of", "packed", "unpacked"]


class Layout:
    """The entries of an explained data set.

    Attributes:
        entries: shape of a row and dtype, by key.
    """

    def __init__(self, entries: Mapping[NestedKey, tuple[torch.Size, torch.dtype]]) -> None:
        self.entries = dict(entries)

    @classmethod
    def of(cls, found: Mapping[NestedKey, Tensor]) -> Layout:
        """The layout of some rows, ``[rows, ...]`` by key."""
        return cls({key: (value.shape[1:], value.dtype) for key, value in found.items()})

    @classmethod
    def from_data(cls, told: Plain) -> Layout:
        """The layout that plain data tell of, as :meth:`as_data` gave them.

        Raises:
            KeyError: something is missing.
            TypeError: they are no such data.
        """
        if not isinstance(told, list):
            raise TypeError(f"{told!r} is no layout")
        entries: dict[NestedKey, tuple[torch.Size, torch.dtype]] = {}
        for one in told:
            key, shape = (one["key"], one["shape"]) if isinstance(one, dict) else (None, None)
            if not isinstance(one, dict) or not isinstance(key, list) or not isinstance(shape, list):
                raise TypeError(f"{one!r} is no entry of a layout")
            dtype = getattr(torch, str(one["dtype"]).removeprefix("torch."), None)
            sizes = [size for size in shape if isinstance(size, int)]
            if not isinstance(dtype, torch.dtype) or sizes != shape:
                raise TypeError(f"{one!r} is no entry of a layout")
            entries[unravel_key(tuple(map(str, key)))] = torch.Size(sizes), dtype
        return cls(entries)

    @property
    def row_bytes(self) -> int:
        """How many bytes a row takes."""
        return sum(shape.numel() * dtype.itemsize for shape, dtype in self.entries.values())

    def as_data(self) -> list[Plain]:
        """As plain data."""
        return [
            {"key": list(parts_of(key)), "dtype": str(dtype), "shape": list(shape)}
            for key, (shape, dtype) in self.entries.items()
        ]


def name_of(key: NestedKey) -> str:
    """The name of an entry in plain data."""
    return ".".join(parts_of(key))


def checksums(
    entries: Mapping[NestedKey, Tensor], so_far: Mapping[NestedKey, int] | None = None
) -> dict[NestedKey, int]:
    """The CRC-32 of rows, by key; that of more rows goes on from that of those before."""
    return {key: zlib.crc32(bytes_of(value), (so_far or {}).get(key, 0)) for key, value in entries.items()}


def packed(found: Mapping[NestedKey, Tensor]) -> bytes:
    """Rows, compressed: a bit for each value that is not zero, and those values."""
    parts = []
    for value in found.values():
        raw = np.frombuffer(bytes_of(value), dtype=f"u{value.element_size()}")
        there = raw != 0  # a negative zero is not lost
        parts += [np.packbits(there).tobytes(), raw[there].tobytes()]
    sizes = np.array([len(part) for part in parts], dtype=np.int64).tobytes()
    return zlib.compress(sizes + b"".join(parts), 1)


def unpacked(data: bytes, count: int, layout: Layout) -> dict[NestedKey, Tensor]:
    """Rows that were compressed, ``[count, ...]`` by key.

    Raises:
        zlib.error: they are cut off.
    """
    data = zlib.decompress(data)
    sizes = np.frombuffer(data, dtype=np.int64, count=2 * len(layout.entries))
    ends = np.cumsum([8 * len(sizes), *sizes]).tolist()
    pieces = [data[begin:end] for begin, end in pairwise(ends)]
    found: dict[NestedKey, Tensor] = {}
    for i, (key, (shape, dtype)) in enumerate(layout.entries.items()):
        number = count * shape.numel()
        there = np.unpackbits(np.frombuffer(pieces[2 * i], dtype=np.uint8), count=number).astype(bool)
        raw = np.zeros(number, dtype=f"u{dtype.itemsize}")
        raw[there] = np.frombuffer(pieces[2 * i + 1], dtype=raw.dtype)
        found[key] = torch.from_numpy(raw.view(np.uint8)).view(dtype).reshape(count, *shape)
    return found
