"""What a run tells: scores, tables for the terminal, plots and model cards.

Nothing here imports torch, so that a report is quick.
"""

from pave_lightning.reporting.scores import Model, Score, ScoreTable

__all__ = ["Model", "Score", "ScoreTable"]
