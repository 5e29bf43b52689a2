"""What a classifier's scores are worth. Pure NumPy: nothing here loads torch."""

from .accuracy import GROUPS, SCALARS, summarise
from .gate import Gate
from .scores import Scores

__all__ = ["GROUPS", "SCALARS", "Gate", "Scores", "summarise"]
