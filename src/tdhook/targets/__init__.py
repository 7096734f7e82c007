"""What is explained: an output, each of them, a difference of two, or whatever you compute from them.

A target is a value. Called with the outputs and the inputs of the model it gives the seeds of the backward pass.
"""

from tdhook.targets.base import Seeder, Seeds, require_dependence
from tdhook.targets.outputs import Contrast, Key, Target, TargetLike, as_seeder

__all__ = ["Contrast", "Key", "Seeder", "Seeds", "Target", "TargetLike", "as_seeder", "require_dependence"]
