"""MLflow stores for the tests of the record."""

import pytest


@pytest.fixture
def store(new_database, tmp_path, monkeypatch):
    """URI of a fresh store; a second one stands where the local fallback is looked for."""
    monkeypatch.chdir(tmp_path)
    new_database(tmp_path / "mlruns" / "mlflow.db")
    return f"sqlite:///{new_database(tmp_path / 'store' / 'mlflow.db')}"
