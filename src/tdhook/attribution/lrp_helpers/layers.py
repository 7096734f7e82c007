"""Layers, under the path that tdhook 0.3 has them; :mod:`tdhook.models.layers` is their home."""

from tdhook.models.layers import *  # noqa: F403
from tdhook.models.layers import __all__ as __all__
