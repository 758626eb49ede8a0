"""A source of task vectors in, a source of purified task vectors out."""

from pave_lightning.purification.stored import StoredPurification, write_purified
from pave_lightning.purification.vectors import KeptRank, PurifiedTaskVectors

__all__ = ["KeptRank", "PurifiedTaskVectors", "StoredPurification", "write_purified"]
