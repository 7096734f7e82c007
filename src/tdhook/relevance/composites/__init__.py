"""What happens where: ordered lists of ``(selector, rule)``, the presets, which are such lists, and mappers."""

from tdhook.relevance.composites import mappers as mappers
from tdhook.relevance.composites import presets as presets
