"""Imports go one way, and starting the command line loads nothing heavy."""

import subprocess
import sys
from graphlib import TopologicalSorter
from pathlib import Path

import grimp
import pytest

PACKAGE = "pave_lightning"
ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def graph():
    return grimp.build_graph(PACKAGE, cache_dir=None)


def test_imports_go_one_way():
    """The floors and what may not be known stand in pyproject.toml; imports in functions count as well."""
    code = "import sys; from importlinter.cli import lint_imports; sys.exit(lint_imports(no_cache=True))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stdout


def test_no_modules_import_each_other(graph):
    imported = {module: graph.find_modules_directly_imported_by(module) - {PACKAGE} for module in graph.modules}
    assert list(TopologicalSorter(imported).static_order())


def test_few_modules_stand_beside_the_rooms():
    loose = [path.stem for path in (ROOT / PACKAGE).glob("*.py")]
    assert len(loose) <= 8, loose


def test_starting_up_loads_nothing_heavy():
    heavy = ["torch", "lightning", "transformers", "mlflow", "datasets"]
    code = f"import sys, {PACKAGE}, {PACKAGE}.cli; print([name for name in {heavy} if name in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_reports_need_no_torch():
    code = (
        "import pkgutil, sys, pave_lightning.reporting as r; "
        "[__import__(found.name) for found in pkgutil.walk_packages(r.__path__, r.__name__ + '.')]; "
        "print('torch' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"


def test_every_public_name_is_there():
    import pave_lightning

    assert len(pave_lightning.__all__) > 20
    for name in pave_lightning.__all__:
        assert getattr(pave_lightning, name) is not None
    with pytest.raises(AttributeError, match="no_such_name"):
        pave_lightning.no_such_name  # noqa: B018
