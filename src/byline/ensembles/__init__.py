"""Ensembles: who votes."""

from byline.ensembles.base import Change, Ensemble, Member, Weights, as_ensemble
from byline.ensembles.crossfit import CrossFit, folds
from byline.ensembles.dropout import Dropout
from byline.ensembles.independent import Independent
from byline.ensembles.lora import LoRA, train_lora
from byline.ensembles.noise import WeightNoise
from byline.ensembles.recorder import Recorder
from byline.ensembles.trajectory import Trajectory

__all__ = [
    "Change",
    "CrossFit",
    "Dropout",
    "Ensemble",
    "Independent",
    "LoRA",
    "Member",
    "Recorder",
    "Trajectory",
    "WeightNoise",
    "Weights",
    "as_ensemble",
    "folds",
    "train_lora",
]
