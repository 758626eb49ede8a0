"""MLflow databases for the tests of the record: making one takes seconds, copying it does not."""

import sqlite3
from contextlib import closing

import pytest

from pave_lightning.tracking.stores import connect


@pytest.fixture(scope="session")
def migrated(tmp_path_factory):
    """A database with all tables and no experiment of ours."""
    path = tmp_path_factory.mktemp("mlflow") / "mlflow.db"
    connect(f"sqlite:///{path}").search_experiments()
    return path


@pytest.fixture
def new_database(migrated):
    """Write a database with all tables and no runs."""

    def copy(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        with closing(sqlite3.connect(migrated)) as source, closing(sqlite3.connect(path)) as target:
            source.backup(target)
        return path

    return copy


@pytest.fixture
def store(new_database, tmp_path, monkeypatch):
    """URI of a fresh store; a second one stands where the local fallback is looked for."""
    monkeypatch.chdir(tmp_path)
    new_database(tmp_path / "mlruns" / "mlflow.db")
    return f"sqlite:///{new_database(tmp_path / 'store' / 'mlflow.db')}"
