"""Engines: where work runs, in this process or on Ray."""

from byline.engines.base import Engine, InProcess
from byline.engines.ray import Ray

__all__ = ["Engine", "InProcess", "Ray"]
