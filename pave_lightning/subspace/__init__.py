"""Which directions of a layer's output its own data excite, and how many of them to keep. Tensors in, tensors out.

Shapes used throughout: a weight is ``d_out x d_in`` and ``d = min(d_out, d_in)``.
"""

from pave_lightning.subspace.allocation import allocate_ranks, even_ranks
from pave_lightning.subspace.projection import KnowledgeSpectrum, Metric, MomentKind, knowledge_spectrum, project

__all__ = [
    "KnowledgeSpectrum",
    "Metric",
    "MomentKind",
    "allocate_ranks",
    "even_ranks",
    "knowledge_spectrum",
    "project",
]
