"""What contributors rely on: one version, one set of pins, files that services read."""

import re
import tomllib
from pathlib import Path

import pytest
from ruamel.yaml import YAML

import pave_lightning

ROOT = Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
PINS = dict(line.split("==") for line in (ROOT / "constraints.txt").read_text().splitlines() if "==" in line)
ADDRESS = "https://github.com/OWNER/pave-lightning"


def read_yaml(path):
    return YAML(typ="safe", pure=True).load(path.read_text())


def test_the_version_stands_in_one_place():
    assert "version" not in PROJECT["project"]
    assert PROJECT["tool"]["setuptools"]["dynamic"]["version"] == {"attr": "pave_lightning.__version__"}
    assert "version" not in read_yaml(ROOT / "CITATION.cff")
    assert f"\n## [{pave_lightning.__version__}]" in (ROOT / "CHANGELOG.md").read_text()


def test_the_changelog_begins_with_what_is_not_released():
    headings = re.findall(r"^## \[(.+)\]", (ROOT / "CHANGELOG.md").read_text(), flags=re.MULTILINE)
    assert headings[0] == "Unreleased"
    kinds = set(re.findall(r"^### (.+)$", (ROOT / "CHANGELOG.md").read_text(), flags=re.MULTILINE))
    assert kinds <= {"Added", "Changed", "Deprecated", "Removed", "Fixed", "Security"}


def test_hooks_use_the_versions_that_the_tests_ran_with():
    hooks = [hook for repo in read_yaml(ROOT / ".pre-commit-config.yaml")["repos"] for hook in repo["hooks"]]
    pinned = [pin for hook in hooks for pin in hook.get("additional_dependencies", [])]
    assert {pin.partition("==")[0] for pin in pinned} == {"ruff", "codespell"}
    assert all(PINS[name] == version for name, version in (pin.split("==") for pin in pinned))


def test_every_dependency_has_a_lower_bound_below_its_pin():
    named = [
        *PROJECT["project"]["dependencies"],
        *(one for own in PROJECT["project"]["optional-dependencies"].values() for one in own),
    ]
    pins = {name.lower().replace("_", "-"): version for name, version in PINS.items()}
    for requirement in named:
        name, bound = re.fullmatch(r"([A-Za-z0-9._-]+)(?:\[.+\])?>=([0-9.]+)", requirement).groups()
        pin = pins[name.lower().replace("_", "-")]
        assert [int(part) for part in bound.split(".")] <= [int(part) for part in re.findall(r"\d+", pin)], requirement


def test_workflows_run_every_python_that_is_promised():
    promised = re.findall(r"Python :: (3\.\d+)", "\n".join(PROJECT["project"]["classifiers"]))
    matrix = read_yaml(ROOT / ".github" / "workflows" / "ci.yml")["jobs"]["tests"]["strategy"]["matrix"]
    assert matrix["python"] == promised
    assert PROJECT["project"]["requires-python"] == f">={promised[0]}"
    assert {"newest", *(extra["versions"] for extra in matrix["include"])} == {"newest", "tested", "lowest"}


def test_workflows_check_what_make_checks():
    recipe = re.search(r"^check:.*\n((?:\t.*\n)+)", (ROOT / "Makefile").read_text(), flags=re.MULTILINE)[1]
    wanted = [line.strip().removeprefix("$(BIN)/") for line in recipe.splitlines()]
    steps = read_yaml(ROOT / ".github" / "workflows" / "ci.yml")["jobs"]["checks"]["steps"]
    assert [step["run"] for step in steps if "run" in step][1:] == wanted


@pytest.mark.parametrize(
    "path", [*sorted((ROOT / ".github").rglob("*.yml")), ROOT / "CITATION.cff"], ids=lambda path: path.name
)
def test_files_that_services_read_are_yaml(path):
    assert isinstance(read_yaml(path), dict)


def test_one_address_is_used():
    files = [ROOT / "pyproject.toml", ROOT / "CITATION.cff", *(ROOT / ".github").rglob("*.*"), ROOT / "CHANGELOG.md"]
    own = [
        found for file in files for found in re.findall(r"https://github\.com/[\w.-]+/pave-lightning", file.read_text())
    ]
    assert own
    assert set(own) == {ADDRESS}


def test_the_image_copies_what_the_build_reads():
    copied = set(re.findall(r"^COPY (.+) \S+$", (ROOT / "Dockerfile").read_text(), flags=re.MULTILINE))
    files = {name for line in copied for name in line.split()}
    allowed = set(re.findall(r"^!(.+)$", (ROOT / ".dockerignore").read_text(), flags=re.MULTILINE))
    assert files == allowed
    assert {"pyproject.toml", "setup.py", "README.md", "LICENSE", "pave_lightning", "recipes"} <= files
