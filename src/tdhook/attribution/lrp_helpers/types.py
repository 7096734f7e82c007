"""Families of modules, under the path that tdhook 0.3 has them; :mod:`tdhook.models.families` is their home."""

from tdhook.models.families import *  # noqa: F403
from tdhook.models.families import __all__ as __all__
