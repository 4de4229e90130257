"""Training: recipes, methods, schedules, the watch for catastrophic overfitting, several processes."""

from models.training.optimizer import parameter_groups
from models.training.recipe import Recipe
from models.training.trainer import EpochRecord, Trainer, TrainingError

__all__ = ["EpochRecord", "Recipe", "Trainer", "TrainingError", "parameter_groups"]
