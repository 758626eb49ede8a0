"""Lightning callbacks that measure what an expert's layers look at."""

from pave_lightning.callbacks.pave_callback import PaveCallback

__all__ = ["PaveCallback"]
