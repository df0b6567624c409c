"""What cuts across papers: Lightning callbacks that work in any project."""

from callbacks.difficulty_ranking import DifficultyRanking
from callbacks.ema_target import EMATarget

__all__ = ["DifficultyRanking", "EMATarget"]
