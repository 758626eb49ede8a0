"""What purification does to the task vectors of a model, layer by layer, as tables.

Pure functions of weights and statistics; one layer of all tasks is held at a time. `diagnose` gives all tables.
"""

from pave_lightning.diagnostics.conflicts import Conflict, RemovedEnergy, compare_pairs, removed_energy
from pave_lightning.diagnostics.diagnose import DiagnosticOptions, Diagnostics, diagnose
from pave_lightning.diagnostics.overlap import SubspaceOverlap, mean_squared_cosine
from pave_lightning.diagnostics.spectra import PruningError, Spectrum, direction_energies, output_energy, pruning_errors

__all__ = [
    "Conflict",
    "DiagnosticOptions",
    "Diagnostics",
    "PruningError",
    "RemovedEnergy",
    "Spectrum",
    "SubspaceOverlap",
    "compare_pairs",
    "diagnose",
    "direction_energies",
    "mean_squared_cosine",
    "output_energy",
    "pruning_errors",
    "removed_energy",
]
