"""byline: which training examples made a PyTorch model say what it said, and how sure that answer is.

Start with ``Task``, an ensemble such as ``Independent``, and a method such as ``TRAK``; the README has ten lines that
run. Importing byline touches neither the network nor the disk.
"""

from importlib.metadata import version as _version
from typing import TYPE_CHECKING, Any

from byline.blend import blend
from byline.ensembles import (
    CrossFit,
    Dropout,
    Ensemble,
    Independent,
    LoRA,
    Recorder,
    Trajectory,
    WeightNoise,
    folds,
    train_lora,
)
from byline.evaluate.detection import class_detection, subclass_detection
from byline.evaluate.lds import LDS, LDSDifference, lds, lds_difference, partial_lds
from byline.evaluate.loo import leave_one_out, leave_one_out_subsets
from byline.evaluate.measure import Measure
from byline.evaluate.mislabel import flip_labels, mislabel_detection
from byline.evaluate.overlap import topk_overlap
from byline.evaluate.removal import brittleness, removal_curve
from byline.evaluate.retraining import Bank, retrain
from byline.evaluate.settled import settled
from byline.features import Dense, Exact, Factorized, LowRank, Nystrom, Preconditioned, Principal
from byline.ledger import Ledger
from byline.methods import (
    TRAK,
    DVEmb,
    GradCos,
    GradDot,
    Influence,
    KNNShapley,
    Random,
    RepresentationSimilarity,
    RepresenterPoints,
    TracIn,
    TrackStar,
)
from byline.outputs import Denoising
from byline.scores import Ranking, Scores
from byline.task import Task
from byline.tokens import TokenScores, tokens
from byline.training import Recipe, Trainer, train_ensemble, train_many
from byline.votes import Votes

if TYPE_CHECKING:
    from byline.serve.client import Client

__version__ = _version("byline")

__all__ = [
    "LDS",
    "TRAK",
    "Bank",
    "Client",
    "CrossFit",
    "DVEmb",
    "Denoising",
    "Dense",
    "Dropout",
    "Ensemble",
    "Exact",
    "Factorized",
    "GradCos",
    "GradDot",
    "Independent",
    "Influence",
    "KNNShapley",
    "LDSDifference",
    "Ledger",
    "LoRA",
    "LowRank",
    "Measure",
    "Nystrom",
    "Preconditioned",
    "Principal",
    "Random",
    "Ranking",
    "Recipe",
    "Recorder",
    "RepresentationSimilarity",
    "RepresenterPoints",
    "Scores",
    "Task",
    "TokenScores",
    "TracIn",
    "TrackStar",
    "Trainer",
    "Trajectory",
    "Votes",
    "WeightNoise",
    "blend",
    "brittleness",
    "class_detection",
    "flip_labels",
    "folds",
    "lds",
    "lds_difference",
    "leave_one_out",
    "leave_one_out_subsets",
    "mislabel_detection",
    "partial_lds",
    "removal_curve",
    "retrain",
    "settled",
    "subclass_detection",
    "tokens",
    "topk_overlap",
    "train_ensemble",
    "train_lora",
    "train_many",
]


def __getattr__(name: str) -> Any:
    # what most users never need is not imported for all
    if name == "Client":
        from byline.serve.client import Client

        return Client
    if name == "serve":
        import byline.serve

        return byline.serve
    raise AttributeError(f"module 'byline' has no attribute {name!r}")
