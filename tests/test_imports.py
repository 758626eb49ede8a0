"""Imports go one way, and starting the command line loads nothing heavy."""

import ast
import subprocess
import sys
from graphlib import TopologicalSorter
from importlib.util import find_spec
from pathlib import Path

import pytest

PACKAGE = "pave_lightning"
ROOT = Path(find_spec(PACKAGE).submodule_search_locations[0])

RECIPE_FILES = {
    *("recipe", "recipe_limits", "recipe_loading", "recipe_overrides", "recipe_problems", "recipe_wording"),
    *("recipe_yaml", "tasks.suites"),
}
LIBRARY = {
    *("callbacks", "costs", "errors", "evaluation", "experts", "exporting", "launching", "merging", "files"),
    *("purification", "recipe", "recipe_loading", "run_folder", "statistics", "subspace", "tasks", "tracking"),
    *("credentials", "hub", "interrupts", "processes", "terminal", "tracking_logger", "weights"),
}

# What each module or folder may import of the package besides itself. The longest name that fits a file counts.
MAY_IMPORT = {
    "credentials": set(),
    "errors": {"credentials"},
    "files": {"errors"},
    "hub": set(),
    "terminal": {"errors"},
    "interrupts": {"errors"},
    "processes": {"errors"},
    "layers": set(),
    "subspace": {"errors"},
    "statistics": {"errors", "files", "subspace"},
    "weights": {"errors", "files", "hub", "layers", "subspace"},
    "tasks": {"errors", "files", "hub", "recipe"},
    "tasks.suites": {"errors", "files"},
    "recipe": {"errors", "files", "recipe_limits", "tasks.suites"},
    "recipe_yaml": {"errors"},
    "recipe_limits": {"errors", "recipe_yaml"},
    "recipe_overrides": {"errors", "recipe_yaml"},
    "recipe_problems": {"errors", "files"} | RECIPE_FILES,
    "recipe_wording": {"credentials", "errors", "recipe", "recipe_overrides", "tasks.suites"},
    "recipe_loading": {"credentials", "errors", "files"} | RECIPE_FILES,
    "callbacks": {"errors", "layers", "statistics"},
    "merging": {"errors", "experts.tokenizers", "files", "layers", "statistics", "subspace", "weights"},
    "merging.methods": {"errors", "layers", "merging", "statistics", "subspace", "weights"},
    "purification": {"errors", "recipe", "statistics", "subspace", "weights"},
    "adding": {"errors", "experts", "merging", "recipe", "reporting.model_card", "weights"},
    "exporting": {"errors", "files", "purification", "weights"},
    "costs": {"errors", "purification", "recipe", "statistics", "subspace", "weights", "merging.base"},
    "diagnostics": {"errors", "merging", "purification", "statistics", "subspace", "weights"},
    "experts": {"errors", "files", "layers", "processes", "recipe", "tasks", "weights"},
    "evaluation": {
        *("errors", "experts.tokenizers", "experts.trainers", "merging.modulators", "merging.running", "recipe"),
        *("tasks", "weights"),
    },
    "run_folder": {"errors", "files", "interrupts"},
    "tracking": {"credentials", "errors", "interrupts"},
    "tracking_logger": {"errors", "tracking"},
    "launching": {"errors", "interrupts", "processes", "recipe", "recipe_loading", "run_folder", "tracking"},
    "reporting": {"diagnostics", "errors", "merging", "purification", "run_folder", "terminal"},
    "reporting.report": {
        *("diagnostics", "errors", "merging", "purification", "recipe", "run_folder", "tasks", "tracking", "reporting"),
        *("terminal", "workflow"),
    },
    "stages": {"errors", "merging", "recipe", "run_folder", "statistics", "tasks", "weights"},
    "choosing": {"errors", "evaluation", "merging", "recipe", "stages", "weights"},
    "workflow": LIBRARY | {"choosing", "stages"},
    "planning": LIBRARY | {"stages"},
    "commands": LIBRARY | {"planning", "reporting", "workflow"},
    "sweeps": LIBRARY | {"commands", "planning", "reporting", "stages", "workflow"},
    "cli": {"adding", "commands", "credentials", "errors", "sweeps", "interrupts", "processes", "recipe_loading"}
    | {"terminal"}
    | {"reporting.methods", "__init__"},
    "__main__": {"cli"},
}
FILES = sorted(path for path in ROOT.rglob("*.py") if path != ROOT / "__init__.py")


def module_of(path):
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def is_module(name):
    path = ROOT.joinpath(*name.split("."))
    return path.with_suffix(".py").is_file() or (path / "__init__.py").is_file()


def imported(path):
    """Modules of the package that a file imports anywhere, in functions too, by their names inside the package."""
    package = path.relative_to(ROOT).parent.parts
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            up = (PACKAGE, *package)[: len(package) + 2 - node.level] if node.level else ()
            start = ".".join([*up, *filter(None, [node.module])])
            inside = start.removeprefix(PACKAGE).removeprefix(".")
            names = [
                f"{start}.{alias.name}" if is_module(".".join(filter(None, [inside, alias.name]))) else start
                for alias in node.names
            ]
        else:
            continue
        for name in names:
            if name == PACKAGE or name.startswith(f"{PACKAGE}."):
                yield name.removeprefix(PACKAGE).removeprefix(".") or "__init__"


def inside(name, folder):
    return name == folder or name.startswith(f"{folder}.")


def rule_of(name):
    fitting = [folder for folder in MAY_IMPORT if inside(name, folder)]
    assert fitting, f"say in this file what {name} may import"
    return max(fitting, key=len)


@pytest.mark.parametrize("path", FILES, ids=module_of)
def test_imports_go_one_way(path):
    rule = rule_of(module_of(path))
    own = rule.partition(".")[0] if rule.startswith("reporting") else rule
    allowed = MAY_IMPORT[rule] | {own}
    wrong = {name for name in imported(path) if not any(inside(name, folder) for folder in allowed)}
    assert not wrong, f"{module_of(path)} must not import {', '.join(sorted(wrong))}"


def test_no_modules_import_each_other():
    graph = {module_of(path): set(imported(path)) - {"__init__"} for path in FILES}
    assert list(TopologicalSorter(graph).static_order())


def test_merging_knows_no_rule_but_to_gather_them():
    knowing = {module_of(path) for path in FILES if any(inside(name, "merging.methods") for name in imported(path))}
    assert {name for name in knowing if inside(name, "merging") and not inside(name, "merging.methods")} == {"merging"}


def test_every_import_is_seen():
    found = set(imported(ROOT / "purification" / "moments.py")) | set(imported(ROOT / "purification" / "vectors.py"))
    assert {"errors", "recipe", "statistics", "subspace", "weights"} <= found
    assert "commands" in set(imported(ROOT / "cli.py")), "imports in functions, and modules imported by their package"


@pytest.mark.parametrize("name", ["workflow", "cli"])
def test_who_may_import_the_top(name):
    allowed = {"workflow": {"commands", "sweeps.running", "planning", "reporting.report"}, "cli": {"__main__"}}[name]
    assert {module_of(path) for path in FILES if name in set(imported(path))} <= allowed


def test_starting_up_loads_nothing_heavy():
    heavy = ["torch", "lightning", "transformers", "mlflow", "datasets"]
    code = f"import sys, {PACKAGE}, {PACKAGE}.cli; print([name for name in {heavy} if name in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_every_public_name_is_there():
    import pave_lightning

    for name in pave_lightning.__all__:
        assert getattr(pave_lightning, name) is not None
    with pytest.raises(AttributeError, match="no_such_name"):
        pave_lightning.no_such_name  # noqa: B018
