"""The MLflow record of a recipe run: one parent run owned by the driver, one child run a stage, never a reason to stop.

MLflow is imported inside functions because the import takes seconds, and only its client is used: the fluent functions
keep global state that would clash with a user's own runs.
"""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
