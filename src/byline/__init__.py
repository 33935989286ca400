"""byline: which training examples made a PyTorch model say what it said, and how sure that answer is.

Start with ``Task``, an ensemble such as ``Independent``, and a method such as ``TRAK``; the README has ten lines that
run. Importing byline touches neither the network nor the disk.
"""

from importlib.metadata import version as _version

from byline.ensembles import Dropout, Ensemble, Independent, LoRA, Trajectory, WeightNoise, train_lora
from byline.evaluate.lds import LDS, lds
from byline.evaluate.retraining import Bank, retrain
from byline.features import Dense, Exact, Factorized, Nystrom
from byline.ledger import Ledger
from byline.methods import TRAK, GradCos, GradDot, Influence, TracIn
from byline.scores import Scores
from byline.task import Task
from byline.training import Recipe, Trainer, train_many

__version__ = _version("byline")

__all__ = [
    "LDS",
    "TRAK",
    "Bank",
    "Dense",
    "Dropout",
    "Ensemble",
    "Exact",
    "Factorized",
    "GradCos",
    "GradDot",
    "Independent",
    "Influence",
    "Ledger",
    "LoRA",
    "Nystrom",
    "Recipe",
    "Scores",
    "Task",
    "TracIn",
    "Trainer",
    "Trajectory",
    "WeightNoise",
    "lds",
    "retrain",
    "train_lora",
    "train_many",
]
