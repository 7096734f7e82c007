"""Transforms of torchrl that make a policy's input of an image (extra ``rl``), as plain linear torch operations."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from tensordict import TensorDictBase
from tensordict.utils import NestedKey
from torch import Tensor
from torchrl.data import TensorSpec, Unbounded
from torchrl.envs.transforms import ObservationTransform
from torchrl.envs.transforms.utils import _set_missing_tolerance

__all__ = ["CropAndPool"]


class CropAndPool(ObservationTransform):
    """Cut a part out of an image and average it over blocks.

    Both are linear maps of the pixels, ``[*batch, channels, rows, columns]`` to
    ``[*batch, channels, height // pool, width // pool]``, and need no torchvision.

    Args:
        height: rows to keep.
        width: columns to keep.
        top: the first row.
        left: the first column.
        pool: side of a block; ``height`` and ``width`` are multiples of it.
        in_keys: floating-point images (:class:`torchrl.envs.transforms.ToTensorImage` makes them), by default
            ``["pixels"]``.
        out_keys: where the result goes, by default where the image was.

    Raises:
        ValueError: the blocks do not fill the part, or, when it is called, the part does not lie in the image.
    """

    def __init__(
        self,
        height: int,
        width: int,
        top: int = 0,
        left: int = 0,
        pool: int = 1,
        in_keys: Sequence[NestedKey] | None = None,
        out_keys: Sequence[NestedKey] | None = None,
    ) -> None:
        keys = ["pixels"] if in_keys is None else list(in_keys)
        super().__init__(in_keys=keys, out_keys=keys if out_keys is None else list(out_keys))
        if min(height, width, pool) < 1 or min(top, left) < 0:
            raise ValueError(
                f"a part of an image has a size and blocks of at least 1 and begins at 0 or later, got "
                f"height={height}, width={width}, top={top}, left={left}, pool={pool}"
            )
        if height % pool or width % pool:
            raise ValueError(
                f"blocks of {pool} x {pool} do not fill {height} x {width}: make both sides multiples of the block's"
            )
        self.height, self.width, self.top, self.left, self.pool = height, width, top, left, pool

    def _apply_transform(self, observation: Tensor) -> Tensor:
        rows, columns = observation.shape[-2:]
        bottom, right = self.top + self.height, self.left + self.width
        if bottom > rows or right > columns:
            raise ValueError(
                f"rows {self.top} to {bottom} and columns {self.left} to {right} do not lie in an image of "
                f"{rows} x {columns}; its shape, {tuple(observation.shape)}, should end with rows and columns"
            )
        part = observation[..., self.top : bottom, self.left : right]
        if self.pool == 1:
            return part
        # Two axes of batch and channels are what avg_pool2d takes.
        flat = part.reshape(-1, 1, self.height, self.width)
        pooled = F.avg_pool2d(flat, self.pool)
        return pooled.reshape(*part.shape[:-2], *pooled.shape[-2:])

    def _reset(self, tensordict: TensorDictBase, tensordict_reset: TensorDictBase) -> TensorDictBase:
        with _set_missing_tolerance(self, True):
            return self._call(tensordict_reset)

    def transform_observation_spec(self, observation_spec: TensorSpec) -> TensorSpec:
        """The specification of what comes out: unbounded images of the new size."""
        for in_key, out_key in zip(self.in_keys, self.out_keys, strict=True):
            spec = observation_spec[in_key]
            shape = self._apply_transform(torch.zeros(spec.shape, device=spec.device)).shape
            observation_spec[out_key] = Unbounded(shape=shape, dtype=spec.dtype, device=spec.device)
        return observation_spec

    def __repr__(self) -> str:
        return (
            f"CropAndPool(height={self.height}, width={self.width}, top={self.top}, left={self.left}, "
            f"pool={self.pool}, in_keys={self.in_keys}, out_keys={self.out_keys})"
        )
