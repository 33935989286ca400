"""Training: recipes, and a trainer that trains many small models at once."""

from byline.training.batched import Run, Trainer, train_many, train_one
from byline.training.ensembles import train_ensemble
from byline.training.recipe import Recipe

__all__ = ["Recipe", "Run", "Trainer", "train_ensemble", "train_many", "train_one"]
