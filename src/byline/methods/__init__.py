"""Methods: features to scores."""

from byline.methods.base import Attributor
from byline.methods.influence import Influence
from byline.methods.similarity import GradCos, GradDot
from byline.methods.tracin import TracIn
from byline.methods.trak import TRAK

__all__ = ["TRAK", "Attributor", "GradCos", "GradDot", "Influence", "TracIn"]
