"""The rules, under the path that tdhook 0.3 has them; :mod:`tdhook.rules` is their home."""

from tdhook.rules import *  # noqa: F403
from tdhook.rules import __all__ as __all__
