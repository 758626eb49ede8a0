"""The MLflow record of a recipe run: one parent run owned by the driver, one child run a stage, never a reason to stop.

MLflow is imported inside functions because the import takes seconds, and only its client is used: the fluent functions
keep global state that would clash with a user's own runs.
"""

from pave_lightning.tracking.environment import environment_tags
from pave_lightning.tracking.record import record_stage
from pave_lightning.tracking.tracker import FALLBACK_URI, Tracker
from pave_lightning.tracking.uris import resolve_uri

__all__ = ["FALLBACK_URI", "Tracker", "environment_tags", "record_stage", "resolve_uri"]
