"""The examples in docstrings are true."""

import doctest
from importlib import import_module
from pathlib import Path

import pytest

import pave_lightning

ROOT = Path(pave_lightning.__file__).parent
FILES = sorted(file for file in ROOT.rglob("*.py") if ">>> " in file.read_text())


@pytest.mark.parametrize("file", FILES, ids=lambda file: str(file.relative_to(ROOT)))
def test_examples(file):
    module = import_module(".".join(file.relative_to(ROOT.parent).with_suffix("").parts))
    found = doctest.testmod(module)
    assert found.attempted
    assert not found.failed
