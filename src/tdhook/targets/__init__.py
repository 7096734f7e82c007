"""What is explained: an output, each of them, a difference of two, or whatever you compute from them.

A target is a value. Called with the outputs and the inputs of the model it gives the seeds of the backward pass.
"""

from tdhook.tape.as_one import as_one
from tdhook.targets.base import Seeder, Seeds, require_dependence
from tdhook.targets.computed import Computed, Derived
from tdhook.targets.contrasts import Contrast, TargetLike, as_seeder
from tdhook.targets.outputs import Key, Target
from tdhook.targets.policies import Entropy, LogProb, Probability
from tdhook.targets.through import Through
from tdhook.targets.time import AtStep
from tdhook.targets.units import Units
from tdhook.targets.values import Advantage, Atom, ExpectedValue

__all__ = [
    "Advantage",
    "AtStep",
    "Atom",
    "Computed",
    "Contrast",
    "Derived",
    "Entropy",
    "ExpectedValue",
    "Key",
    "LogProb",
    "Probability",
    "Seeder",
    "Seeds",
    "Target",
    "TargetLike",
    "Through",
    "Units",
    "as_one",
    "as_seeder",
    "require_dependence",
]
