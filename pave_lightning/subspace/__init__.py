"""Which directions of a layer's output its own data excite, and how many of them to keep. Tensors in, tensors out.

Shapes used throughout: a weight is ``d_out x d_in`` and ``d = min(d_out, d_in)``.
"""

from pave_lightning.subspace.allocation import (
    UnreachableBudgetError,
    allocate_ranks,
    averaged_ranks,
    even_ranks,
    spectral_budget,
)
from pave_lightning.subspace.factorisation import Triplets, leading_triplets, polar_factor
from pave_lightning.subspace.finiteness import is_finite
from pave_lightning.subspace.parallel import in_parallel, one_blas_thread
from pave_lightning.subspace.projection import (
    KnowledgeSpectrum,
    Metric,
    MomentKind,
    knowledge_spectrum,
    moment_shape,
    project,
    remove_tail,
)
from pave_lightning.subspace.ridge import AnchoredRidge

__all__ = [
    "AnchoredRidge",
    "KnowledgeSpectrum",
    "Metric",
    "MomentKind",
    "Triplets",
    "UnreachableBudgetError",
    "allocate_ranks",
    "averaged_ranks",
    "even_ranks",
    "in_parallel",
    "is_finite",
    "knowledge_spectrum",
    "leading_triplets",
    "moment_shape",
    "one_blas_thread",
    "polar_factor",
    "project",
    "remove_tail",
    "spectral_budget",
]
