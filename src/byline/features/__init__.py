"""Features: per-example gradients as rows."""

from byline.features.base import Features
from byline.features.dense import Dense
from byline.features.exact import Exact
from byline.features.factorized import Factorized
from byline.features.lowrank import LowRank
from byline.features.nystrom import Nystrom
from byline.features.preconditioned import Preconditioned
from byline.features.principal import Principal

__all__ = ["Dense", "Exact", "Factorized", "Features", "LowRank", "Nystrom", "Preconditioned", "Principal"]
