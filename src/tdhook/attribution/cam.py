"""Grad-CAM and its relatives: how the gradient weighs the units of a layer."""

from __future__ import annotations

import torch
from torch import Tensor

from tdhook.attribution.activation_maps import ActivationMap
from tdhook.conventions import per_value

__all__ = ["GradCAM", "GradCAMPlusPlus", "HiResCAM", "LayerCAM", "XGradCAM"]


class GradCAM(ActivationMap):
    """Each channel counts by the mean of its gradient (Selvaraju et al. 2017, eq. 1 and 2)."""

    def weighed(self, gradient: Tensor, value: Tensor) -> Tensor:
        """Values times mean gradients."""
        return gradient.mean(-1, keepdim=True) * value


class GradCAMPlusPlus(ActivationMap):
    """Each channel counts by its positive gradients, the fewer places have one the more (Chattopadhay et al. 2018).

    Their eq. 19, for a target whose exponential is the score.
    """

    def weighed(self, gradient: Tensor, value: Tensor) -> Tensor:
        """Values times the weighted sum of positive gradients."""
        square = gradient.square()
        bottom = 2 * square + value.sum(-1, keepdim=True) * square * gradient
        return (per_value(bottom, square) * gradient.clamp(min=0)).sum(-1, keepdim=True) * value


class HiResCAM(ActivationMap):
    """Each unit counts by its own gradient, so that the map adds up as the layer does (Draelos and Carin 2020)."""

    def weighed(self, gradient: Tensor, value: Tensor) -> Tensor:
        """Values times gradients."""
        return gradient * value


class LayerCAM(ActivationMap):
    """Each unit counts by its own gradient where that is positive (Jiang et al. 2021, eq. 5)."""

    def weighed(self, gradient: Tensor, value: Tensor) -> Tensor:
        """Values times positive gradients."""
        return gradient.clamp(min=0) * value


class XGradCAM(ActivationMap):
    """Each channel counts by the mean of its gradient, weighted by its values (Fu et al. 2020, eq. 9)."""

    def weighed(self, gradient: Tensor, value: Tensor) -> Tensor:
        """Values times weighted mean gradients; a channel whose values sum to zero counts for nothing."""
        total = value.sum(-1, keepdim=True)
        mean = (gradient * value).sum(-1, keepdim=True) / torch.where(total == 0, 1.0, total)
        return torch.where(total == 0, 0.0, mean) * value
