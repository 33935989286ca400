"""Methods: features to scores."""

from byline.methods.base import Attributor
from byline.methods.dvemb import DVEmb
from byline.methods.influence import Influence
from byline.methods.knn_shapley import KNNShapley
from byline.methods.random_baseline import Random
from byline.methods.representation import RepresentationSimilarity
from byline.methods.representer import RepresenterPoints
from byline.methods.similarity import GradCos, GradDot
from byline.methods.tracin import TracIn
from byline.methods.trackstar import TrackStar
from byline.methods.trak import TRAK

__all__ = [
    "TRAK",
    "Attributor",
    "DVEmb",
    "GradCos",
    "GradDot",
    "Influence",
    "KNNShapley",
    "Random",
    "RepresentationSimilarity",
    "RepresenterPoints",
    "TracIn",
    "TrackStar",
]
