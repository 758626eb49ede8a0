"""Options of the record."""

from __future__ import annotations

from pave_lightning.config import Section


class Tracking(Section):
    """Where MLflow keeps the record."""

    uri: str = "sqlite:///mlruns/mlflow.db"
    """MLflow tracking URI: a database or a server. Plain folders are no longer supported by MLflow. A percent sign in a
    path is written %25. Write *** for a password or token and set the environment variable PAVE_TRACKING_URI to the
    full URI: secrets are written to no file."""
    experiment: str = "pave-lightning"
    """MLflow experiment."""
    upload_models: bool = False
    """Also store the merged models' weights as MLflow artifacts."""
