"""What a model knew and what it learned: answers, scores, and the numbers made of them."""

from .answer import answer
from .drift import drift, self_prompts
from .fisher import fisher, spoken
from .run import comparison, curve, evaluate, gallery
from .score import interval, score
from .strength import strength
from .tasks import Task, tasks

__all__ = [
    "Task",
    "answer",
    "comparison",
    "curve",
    "drift",
    "evaluate",
    "fisher",
    "gallery",
    "interval",
    "score",
    "self_prompts",
    "spoken",
    "strength",
    "tasks",
]
