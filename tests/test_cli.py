"""The command as a user meets it: help, mistakes, exit codes."""

import contextlib
import errno
import json
import logging
import re
import resource
import shlex
import signal
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest
from safetensors import SafetensorError

from pave_lightning import Recipe
from pave_lightning.cli import RECIPE_COMMANDS, main
from pave_lightning.errors import PaveError, doing
from pave_lightning.merging import known_methods
from pave_lightning.pipeline import adding, commands
from pave_lightning.recipe.loading import recipe_to_yaml
from pave_lightning.transforms import known_transforms


@pytest.fixture
def recipe_file(recipe_settings, tmp_path):
    path = tmp_path / "tiny.yaml"
    path.write_text(recipe_to_yaml(Recipe.model_validate(recipe_settings)))
    return str(path)


def fails(arguments, capsys):
    """The message of a call that must end with exit code 2 and without a traceback."""
    try:
        code = main(arguments)
    except SystemExit as stop:
        code = stop.code
    shown = capsys.readouterr()
    assert code == 2, shown
    assert "Traceback" not in shown.err
    assert shown.err.strip()
    return shown.err


def test_help_is_fast_and_loads_nothing_heavy():
    script = (
        "import sys, time; from pave_lightning.cli import main\n"
        "try:\n    main(['--help'])\nexcept SystemExit: pass\n"
        "heavy = {'torch', 'lightning', 'transformers', 'mlflow', 'datasets', 'pandas'} & set(sys.modules)\n"
        "sys.exit(f'loaded {heavy}' if heavy else 0)"
    )
    took = []
    for _ in range(3):
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=60)
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        took.append(after.ru_utime - before.ru_utime + after.ru_stime - before.ru_stime)
        assert done.returncode == 0, done.stderr
        assert "evaluate" in done.stdout
    assert min(took) < 0.3  # seconds of the processor: others may use the machine


@pytest.mark.parametrize(
    "command",
    [
        *RECIPE_COMMANDS,
        *("quickstart", "new", "recipes", "sweep", "compare", "convert", "export", "methods", "transforms", "schema"),
    ],
)
def test_every_command_has_help(command, capsys):
    with pytest.raises(SystemExit) as stop:
        main([command, "--help"])
    assert stop.value.code == 0
    assert "--debug" in capsys.readouterr().out


def test_no_command_and_wrong_flags_are_told(capsys, recipe_file):
    assert "run" in fails([], capsys)
    assert "rnu" in fails(["rnu", recipe_file], capsys)
    assert "--stet" in fails(["run", recipe_file, "--stet", "a=1"], capsys)
    assert "recipe" in fails(["run"], capsys)
    for abbreviated in ("--prin", "--deb"):
        assert abbreviated in fails(["plan", recipe_file, abbreviated], capsys)


def test_options_that_take_one_value_are_not_taken_twice(capsys, recipe_file, monkeypatch):
    monkeypatch.setattr(adding, "add_expert", lambda *arguments: pytest.fail("an expert was added"))
    twice = ["merge", "--into", "m", "--add", "a=x", "--add", "b=y"]
    assert "found a=x, b=y; add one expert after the other" in fails(twice, capsys)
    assert "--into takes one value" in fails(["merge", "--into", "m", "--into", "n", "--add", "a=x"], capsys)
    assert "--task takes one value" in fails(["fit", recipe_file, "--task", "words", "--task", "numbers"], capsys)


def test_every_method_and_transform_is_explained_without_markup(capsys):
    for command in [
        *(["methods", name] for name in known_methods()),
        *(["transforms", name] for name in known_transforms()),
    ]:
        assert main(list(command)) == 0
        shown = capsys.readouterr().out
        assert not re.search(r":[a-z]+:`|\.\. math|``|\\[a-z]", shown), shown


def test_mistakes_in_a_recipe_are_told_at_once_with_the_nearest_names(capsys, recipe_file):
    assert "tiny.yaml" in fails(["run", recipe_file.replace("tiny.yaml", "tinny.yaml")], capsys)
    text = fails(["plan", recipe_file, "--set", "purify.rhoo=0.9", "--set", "capture.examples=0"], capsys)
    assert "did you mean 'rho'" in text
    assert "capture.examples" in text
    text = fails(
        [
            *("run", recipe_file, "--set", "merge.emr.method=emrr", "--set", "merge.0.options.density=2"),
            *("--set", "trainer.max_epoch=2", "--set", "tasks.words.label=labell", "--set", "tracking.uri=file:./x"),
        ],
        capsys,
    )
    for hint in ("did you mean 'emr'", "density", "did you mean 'max_epochs'", "'label'", "sqlite:///"):
        assert hint in text
    assert "Recipe(" not in text


def test_a_scale_for_a_rule_without_one_is_refused(capsys, recipe_file):
    assert "emr has no scale" in fails(["plan", recipe_file, "--set", "merge.emr.scale=0.4"], capsys)


@pytest.mark.usefixtures("as_in_a_terminal")
def test_a_mistake_that_ends_a_stopped_command_is_told(capsys, recipe_file, monkeypatch):
    def swallow(*_, **options):
        with contextlib.suppress(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)
        raise PaveError("the data are broken")

    monkeypatch.setattr(commands, "plan_recipe", swallow)
    assert main(["plan", recipe_file]) == 130
    assert capsys.readouterr().err == (
        "error: the data are broken\nstopped; run the same command again to go on from here\n"
    )


def test_plan_runs_and_writes_nothing(capsys, recipe_file, recipe_settings, tmp_path, monkeypatch):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    monkeypatch.setenv("COLUMNS", "120")
    assert main(["plan", recipe_file]) == 0
    shown = capsys.readouterr().out
    assert "experts/words" in shown
    assert "48 rows, 2 epochs, 6 steps of 16" in shown
    assert "purification, by shape of layer (predicted)" in shown
    assert "purifying and merging" in shown
    assert not Path(recipe_settings["output"]).exists()
    assert not list(Path(tempfile.gettempdir()).glob("pave-plan-*"))


def test_mistakes_in_the_options_of_methods_are_told_beside_those_of_the_recipe(capsys, recipe_file):
    changes = ["--set", "merge.0={method: ties, options: {densitty: 0.2}}", "--set", "evaluate.zzz=5"]
    for command in ("plan", "run"):
        assert main([command, recipe_file, *changes]) == 2
        told = capsys.readouterr().err
        assert "evaluate.zzz: unknown key" in told
        assert "densitty: unknown option; did you mean 'density'?" in told


def test_mistakes_in_the_options_of_transforms_are_told_beside_those_of_the_recipe(capsys, recipe_file):
    one, two = "one: [dare, {dare: {drop_rat: 0.2}}]", "two: [{depth: {}}, {pave: {rho: 2.0}}]"
    stacks = f"vectors={{{one}, {two}, unused: [{{depth_scale: {{}}}}]}}"
    step = "merge.0={method: average, vectors: [one, two]}"
    assert main(["plan", recipe_file, "--set", stacks, "--set", step, "--set", "evaluate.zzz=5"]) == 2
    told = capsys.readouterr().err
    assert "evaluate.zzz: unknown key" in told
    assert "vectors.one.1: the options of transform 'dare'" in told
    assert "drop_rat: unknown option; did you mean 'drop_rate'?" in told
    assert "vectors.two.0: unknown transform 'depth'" in told
    assert "vectors.two.1: the options of transform 'pave'" in told
    assert "vectors.unused.0: the options of transform 'depth_scale'" in told
    assert "it scales nothing; give factors, such as {first: 0.5}" in told


def test_print_config_shows_every_default_and_is_a_recipe_itself(capsys, recipe_file, tmp_path):
    assert main(["run", recipe_file, "--print-config", "--set", "merge.0.scale=0.4"]) == 0
    shown = capsys.readouterr().out
    assert "stopping_share: 1.5" in shown
    again = tmp_path / "again.yaml"
    again.write_text(shown)
    assert main(["run", str(again), "--print-config"]) == 0
    assert capsys.readouterr().out == shown


def test_methods_lists_all_of_them(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")
    assert main(["methods"]) == 0
    shown = capsys.readouterr().out
    assert all(name in shown for name in known_methods())
    assert main(["methods", "ties"]) == 0
    shown = capsys.readouterr().out
    assert "options.density (default 0.2)" in shown
    assert "= sgn(∑_t τ\N{COMBINING CIRCUMFLEX ACCENT}_t)." in shown
    assert "did you mean 'ties'" in fails(["methods", "tiess"], capsys)


def test_transforms_lists_all_of_them(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")
    assert main(["transforms"]) == 0
    shown = capsys.readouterr().out
    assert all(name in shown for name in known_transforms())
    assert main(["transforms", "depth_scale"]) == 0
    shown = capsys.readouterr().out
    assert "first (default 1.0): Factor of the first block" in shown
    assert "last (default 1.0)" in shown
    assert "did you mean 'pave'" in fails(["transforms", "pavee"], capsys)


def test_schema_is_json(capsys):
    assert main(["schema"]) == 0
    assert json.loads(capsys.readouterr().out)["type"] == "object"


def test_sweeps_that_are_none(capsys, recipe_file, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert "name" in fails(["sweep"], capsys)
    assert "there is no sweep 'nonsense'" in fails(["sweep", "nonsense"], capsys)
    assert "no section 'sweep'" in fails(["sweep", recipe_file], capsys)
    assert "did you mean 'vary'" in fails(["sweep", recipe_file, "--set", "sweep.varry={}"], capsys)


def test_purify_and_diagnose_say_what_they_lack_and_purify_where_its_results_are(capsys, ready_settings, tmp_path):
    import torch
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    path = tmp_path / "ready.yaml"
    path.write_text(json.dumps(ready_settings))
    recipe_file, root = str(path), Path(ready_settings["output"]) / "tiny"
    for command in ("purify", "diagnose"):
        assert "pave fit --task words" in fails([command, recipe_file], capsys)
    assert main(["fit", recipe_file]) == 0
    for command in ("purify", "diagnose"):
        assert "pave capture --task words" in fails([command, recipe_file], capsys)
        text = fails([command, recipe_file, "--set", "purify.rho=auto"], capsys)
        assert "a number at purify.rho" in text
    assert main(["capture", recipe_file]) == 0
    capsys.readouterr()

    assert main(["purify", recipe_file]) == 0
    (made,) = (root / "purified-experts").iterdir()
    assert f"results: {made}" in capsys.readouterr().out
    for task in ready_settings["tasks"]:
        before = AutoModelForSequenceClassification.from_pretrained(task["expert"]["from"]).state_dict()
        after = AutoModelForSequenceClassification.from_pretrained(made / task["name"]).state_dict()
        AutoTokenizer.from_pretrained(made / task["name"])
        assert list(after) == list(before)
        changed = {name for name in after if not torch.equal(before[name], after[name])}
        assert changed
        assert all(before[name].ndim == 2 for name in changed)
        assert not [name for name in changed if "embeddings" in name or name.startswith("classifier")]
        assert json.loads((made / task["name"] / "pave.json").read_text())["purify"]["rho"] == 0.9


@pytest.mark.slow
def test_diagnose_says_where_its_results_are(capsys, ready_settings, tmp_path):
    import pandas as pd

    path = tmp_path / "ready.yaml"
    path.write_text(json.dumps(ready_settings))
    recipe_file, root = str(path), Path(ready_settings["output"]) / "tiny"
    for command in ("fit", "capture"):
        assert main([command, recipe_file]) == 0
    capsys.readouterr()
    assert main(["diagnose", recipe_file]) == 0
    (found,) = (root / "diagnostics").iterdir()
    assert f"results: {found}" in capsys.readouterr().out
    tables, pictures = list(found.glob("*.parquet")), list(found.glob("*.png"))
    assert {path.stem for path in tables} >= {"spectra", "kept_ranks", "removed_energy", "conflicts"}
    assert all(len(pd.read_parquet(path)) for path in tables)
    assert pictures
    assert all(path.read_bytes().startswith(b"\x89PNG") for path in pictures)


def test_a_fault_of_ours_is_one_line_unless_debug(capsys, recipe_file, monkeypatch):
    def explode(*args, **options):
        raise RuntimeError("broken inside")

    monkeypatch.setattr(commands, "plan_recipe", explode)
    assert main(["plan", recipe_file]) == 1
    assert "broken inside" in capsys.readouterr().err
    with pytest.raises(RuntimeError):
        main(["plan", recipe_file, "--debug"])


def test_a_folder_in_use_is_refused(capsys, recipe_file, recipe_settings):
    from pave_lightning.pipeline.run_folder import RunFolder

    with RunFolder(Path(recipe_settings["output"]) / "tiny").locked():
        assert "another pave process" in fails(["fit", recipe_file], capsys)


@pytest.mark.parametrize(
    ("error", "told"),
    [
        (OSError(errno.ENOSPC, "No space left on device"), "error: No space left on device; make room"),
        (PermissionError(errno.EACCES, "Permission denied", "/a/b"), "error: /a/b: Permission denied; let this user"),
        (OSError(errno.EFBIG, "File too large", "from", None, "to"), "error: to: File too large; make room"),
        (
            SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)"),
            "I/O error: No space left on device (os error 28); make room",
        ),
    ],
)
def test_what_the_system_refuses_is_told_as_such(capsys, recipe_file, monkeypatch, error, told):
    def refuse(*arguments, **options):
        raise error

    monkeypatch.setattr(commands, "plan_recipe", refuse)
    shown = fails(["plan", recipe_file], capsys)
    assert told in shown
    assert "unexpected" not in shown


@pytest.mark.parametrize("error", [OSError("no number"), OSError(errno.ENOENT, "gone"), SafetensorError("bad header")])
def test_what_may_be_a_fault_of_ours_stays_one(capsys, recipe_file, monkeypatch, error):
    def explode(*arguments, **options):
        raise error

    monkeypatch.setattr(commands, "plan_recipe", explode)
    assert main(["plan", recipe_file]) == 1
    assert "unexpected error" in capsys.readouterr().err


def test_a_run_that_may_not_write_a_large_file_says_so(capsys, recipe_file):
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, hard))
    try:
        told = fails(["fit", recipe_file], capsys)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert "File too large" in told
    assert "unexpected" not in told


def test_what_fails_is_named(caplog, monkeypatch):
    monkeypatch.setattr(logging.getLogger("pave_lightning"), "propagate", True)
    caplog.set_level(logging.INFO, "pave_lightning")
    with pytest.raises(PaveError, match=r"^merge ties \(plain\): no scale$"), doing("merge ties (plain)"):
        raise PaveError("no scale")
    with doing("merge average (plain)"):
        pass
    assert "merge ties (plain) broke off after" in caplog.text
    assert "merge average (plain) broke off after" not in caplog.text
    assert "merge average (plain) done in" in caplog.text


def test_evaluate_says_where_the_scores_are(capsys, ready_settings, tmp_path):
    path = tmp_path / "ready.yaml"
    path.write_text(json.dumps({**ready_settings, "merge": []}))
    assert main(["fit", str(path)]) == 0
    capsys.readouterr()
    assert main(["evaluate", str(path)]) == 0
    assert f"results: {Path(ready_settings['output']) / 'tiny' / 'scores'}" in capsys.readouterr().out


def test_run_says_that_it_runs_no_sweep(capsys, ready_settings, tmp_path, monkeypatch):
    path = tmp_path / "varied.yaml"
    path.write_text(json.dumps({**ready_settings, "sweep": {"question": "Which?", "vary": {"purify.rho": [0.9, 0.8]}}}))
    monkeypatch.setattr(commands, "run_recipe", lambda recipe, **options: None)
    assert main(["run", str(path)]) == 0
    assert f"`pave sweep {path}`" in capsys.readouterr().err


def test_a_program_says_all_and_ends_with_its_exit_code():
    program = [sys.executable, "-m", "pave_lightning"]
    done = subprocess.run([*program, "schema"], capture_output=True, text=True)
    assert done.returncode == 0
    assert json.loads(done.stdout)["type"] == "object"
    wrong = subprocess.run([*program, "sweep", "nonsense"], capture_output=True, text=True)
    assert wrong.returncode == 2
    assert "there is no sweep 'nonsense'" in wrong.stderr


@pytest.mark.parametrize("closed", [">&-", "2>&-", "<&-", "<&- >&- 2>&-"])
def test_standard_streams_may_be_closed(closed, tmp_path):
    """The command does its work, and no file that it opens takes the number of a stream that others print to."""
    program = [sys.executable, "-m", "pave_lightning", "sweep", "nonsense"]
    script = f'{shlex.join(program)} {closed}; echo "ended with $?" >> ended'
    subprocess.run(["bash", "-c", script], cwd=tmp_path, capture_output=True, text=True, timeout=60)
    assert (tmp_path / "ended").read_text() == "ended with 2\n"
    number = "from pave_lightning.cli import _open_closed_streams as o; o(); print(open('/dev/null').fileno() > 2)"
    script = f"{shlex.join([sys.executable, '-c', number])} {closed}"
    done = subprocess.run(["bash", "-c", script], cwd=tmp_path, capture_output=True, text=True, timeout=60)
    assert done.stderr == ""
    assert done.stdout == ("" if ">&-" in closed.replace("2>&-", "") else "True\n")
