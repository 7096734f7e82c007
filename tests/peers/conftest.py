"""Makes zennit importable: it imports torchvision for its model classes."""

from __future__ import annotations

from torchvision_shim import import_torchvision

import_torchvision()
