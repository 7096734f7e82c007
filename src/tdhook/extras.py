"""Packages that may be missing: each belongs to an extra, and whoever needs one says what to install."""

from __future__ import annotations

import importlib
from types import ModuleType

__all__ = ["EXTRAS", "require"]

EXTRAS = {
    "torchrl": "rl",
    "gymnasium": "rl",
    "matplotlib": "viz",
    "ale_py": "atari",
    "imageio_ffmpeg": "video",
    "PIL": "video",
    "rich": "cli",
    "typer": "cli",
    "tomli": "cli",
    "sklearn": "clusters",
    "scipy": "clusters",
    "umap": "clusters",
    "h5py": "minari",
    "pyarrow": "tables",
    "av": "lerobot",
    "ray": "ray",
    "cloudpickle": "rl",
}
"""The extra of each package that is not always there, by the name that it is imported by."""

_INSTALLED_AS = {
    "PIL": "Pillow",
    "imageio_ffmpeg": "imageio-ffmpeg",
    "ale_py": "ale-py",
    "sklearn": "scikit-learn",
    "umap": "umap-learn",
}


def require(module: str, who: str) -> ModuleType:
    """Import a module of an optional package, or say what to install.

    Args:
        module: dotted name of the module.
        who: what needs it, for the message: ``"tdhook.plots"``.

    Raises:
        ImportError: the package is not installed.
    """
    package = module.partition(".")[0]
    try:
        importlib.import_module(package)
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        if error.name != package:  # installed, but broken: its own message says more
            raise
        name, extra = _INSTALLED_AS.get(package, package), EXTRAS[package]
        raise ImportError(
            f'{who} needs {name}, which is not installed: pip install "tdhook[{extra}]"'
        ) from error
