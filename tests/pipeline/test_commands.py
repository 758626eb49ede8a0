"""A whole run on a tiny random BERT: what it leaves, what it does again, what it survives."""

import csv
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from transformers import AutoModel, AutoModelForSequenceClassification, AutoTokenizer

from pave_lightning import Recipe, load_merged, run_recipe
from pave_lightning.errors import PaveError
from pave_lightning.recipe.loading import recipe_to_yaml
from pave_lightning.statistics import TaskStatistics
from pave_lightning.tasks.predictions import read_predictions


@pytest.fixture
def recipe(recipe_settings):
    return Recipe.model_validate(recipe_settings)


def manifests(folder):
    return {str(path.parent.relative_to(folder)): path.stat().st_mtime_ns for path in folder.rglob("manifest.json")}


def changed(before, after):
    return {stage for stage in after if before.get(stage) != after[stage]}


def rerun(settings, **changes):
    return run_recipe(Recipe.model_validate({**settings, **changes}))


def test_a_run_leaves_everything_it_promises(recipe, tracking_uri, capsys):
    folder = run_recipe(recipe)

    for task, outputs in (("words", 2), ("numbers", 1)):
        expert = AutoModelForSequenceClassification.from_pretrained(folder / "experts" / task)
        assert expert.config.num_labels == outputs
        AutoTokenizer.from_pretrained(folder / "experts" / task)
        statistics = TaskStatistics.load(folder / "statistics" / task / "moments.safetensors")
        assert statistics.examples == 32
        assert "encoder.layer.1.output.dense" in statistics.layers()
    assert expert.config.problem_type == "regression"

    for name in ("task_arithmetic-plain", "task_arithmetic-purified", "emr-plain", "emr-purified"):
        AutoModel.from_pretrained(folder / "merged" / name)
        AutoTokenizer.from_pretrained(folder / "merged" / name)
        assert load_merged(folder / "merged" / name, "words").config.num_labels == 2
        assert (folder / "merged" / name / "README.md").read_text().startswith("---")

    written = [folder / "results.csv", *folder.rglob("*.safetensors")]
    assert len({file.stat().st_mode for file in written}) == 1, "others may read weights as they may read any new file"

    rows = list(csv.DictReader((folder / "results.csv").open()))
    assert [(row["model"], row["vectors"]) for row in rows] == [
        ("base", ""),
        ("experts", ""),
        ("task_arithmetic", "plain"),
        ("task_arithmetic", "purified"),
        ("emr", "plain"),
        ("emr", "purified"),
    ]
    assert float(rows[1]["normalised_average"]) == 1.0
    for picture in ("normalised_scores.png", "kept_ranks.png"):
        assert (folder / picture).read_bytes().startswith(b"\x89PNG")
    assert (folder / "recipe.yaml").is_file()
    assert not (folder / "training").exists() or not list((folder / "training").iterdir())
    assert "normalised" in capsys.readouterr().out

    from mlflow import MlflowClient

    client = MlflowClient(tracking_uri)
    experiment = client.get_experiment_by_name("pave-lightning").experiment_id
    runs = client.search_runs([experiment])
    parent = next(run for run in runs if client_key(run).startswith(str(folder.resolve())))
    children = {run.info.run_name: run for run in runs if run.data.tags.get("mlflow.parentRunId") == parent.info.run_id}
    assert parent.info.status == "FINISHED"
    assert {run.info.status for run in children.values()} == {"FINISHED"}
    assert set(children) >= {"expert:words", "expert:numbers", "merge:emr:plain", "merge:task_arithmetic:purified"}
    assert "train/loss" in children["expert:words"].data.metrics
    assert children["merge:task_arithmetic:plain"].data.params["method"] == "task_arithmetic"
    assert parent.data.tags["version.torch"].startswith(torch.__version__.split("+")[0])
    stored = {file.path for file in client.list_artifacts(parent.info.run_id)}
    assert stored >= {"recipe.yaml", "results.csv", "normalised_scores.png", "kept_ranks.png"}


def client_key(run):
    return run.data.tags.get("pave.key", "")


def test_scores_are_those_of_the_folders_that_are_left(recipe, finished):
    from pave_lightning.tasks.data import load_split

    folder = finished
    task = recipe.task("words")
    rows = load_split(task, "test", seed=0, cache_dir=folder / "data")
    tokenizer = AutoTokenizer.from_pretrained(folder / "experts" / "words")
    encoded = tokenizer(rows["text"].to_pylist(), padding=True, truncation=True, max_length=16, return_tensors="pt")
    labels = torch.tensor(rows["label"].to_pylist())
    table = {(row["model"], row["vectors"]): row for row in csv.DictReader((folder / "results.csv").open())}
    for model, vectors in (("task_arithmetic", "purified"), ("emr", "plain"), ("emr", "purified")):
        merged = load_merged(folder / "merged" / f"{model}-{vectors}", "words")
        with torch.no_grad():
            accuracy = (merged(**encoded).logits.argmax(-1) == labels).double().mean()
        assert float(table[model, vectors]["words/accuracy"]) == pytest.approx(float(accuracy), abs=1e-6)


def test_a_second_run_does_nothing_again_and_a_change_only_what_depends_on_it(recipe_settings, finished):
    folder, first = finished, manifests(finished)

    rerun(recipe_settings)
    assert manifests(folder) == first

    rerun(recipe_settings, purify={"rho": 0.8})
    second = manifests(folder)
    again = changed(first, second)
    assert {stage.split("/")[0] for stage in again} == {"purified", "merged", "scores"}
    assert all("purified" in stage for stage in again)

    tasks = [dict(task) for task in recipe_settings["tasks"]]
    tasks[0]["training"] = {"weight_decay": 0.1}
    rerun(recipe_settings, purify={"rho": 0.8}, tasks=tasks)
    again = changed(second, manifests(folder))
    assert {"experts/words", "statistics/words"} <= again
    assert not {"experts/numbers", "statistics/numbers", "scores/base"} & again - {"scores/base"}
    assert {"scores/experts", "merged/emr-plain"} <= again


def test_damaged_results_are_made_again(recipe_settings, finished):
    weights = finished / "experts" / "words" / "model.safetensors"
    whole = weights.read_bytes()
    weights.write_bytes(whole[:-10])
    rerun(recipe_settings)
    assert weights.read_bytes() == whole


def test_an_existing_expert_is_only_captured(recipe_settings, expert_folders):
    settings = dict(recipe_settings)
    settings["tasks"] = [
        {**settings["tasks"][0], "expert": {"from": str(expert_folders["first"])}},
        settings["tasks"][1],
    ]
    folder = rerun(settings)
    assert not (folder / "experts" / "words" / "model.safetensors").exists()
    assert (folder / "statistics" / "words" / "moments.safetensors").is_file()
    assert (folder / "scores" / "emr-purified" / "manifest.json").is_file()


@pytest.mark.slow  # test_every_method trains adapters, experts/test_adapters takes them in
def test_lora_experts_merge_like_full_ones_and_their_adapters_can_be_taken_in(recipe_settings):
    settings = dict(recipe_settings)
    settings["training"] = {**settings["training"], "lora": {"rank": 2}}
    folder = rerun(settings)
    adapter = folder / "experts" / "words" / "adapter"
    assert (adapter / "adapter_model.safetensors").is_file()

    again = {**settings, "name": "taken"}
    again["tasks"] = [{**settings["tasks"][0], "expert": {"from": str(adapter)}}, settings["tasks"][1]]
    taken = rerun(again)
    text = AutoTokenizer.from_pretrained(folder / "experts" / "words")(["w3 w50 w7"], return_tensors="pt")
    logits = [
        AutoModelForSequenceClassification.from_pretrained(place / "experts" / "words").eval()(**text).logits
        for place in (folder, taken)
    ]
    torch.testing.assert_close(*logits)


def test_purified_experts_have_scores_and_stand_in_the_tables(ready_settings, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "120")
    folder = rerun(ready_settings, evaluate={"purified_experts": True}, merge=["emr"])
    shown = capsys.readouterr().out
    rows = {(row["model"], row["vectors"]): row for row in csv.DictReader((folder / "results.csv").open())}
    assert list(rows) == [("base", ""), ("experts", ""), ("experts", "purified"), ("emr", "plain"), ("emr", "purified")]
    assert rows["experts", "purified"]["form"] == "per-task"
    assert float(rows["experts", ""]["normalised_average"]) == 1.0
    assert "experts *" in shown

    from pave_lightning.pipeline.commands import run_stage

    run_stage(Recipe.model_validate({**ready_settings, "merge": ["emr"]}), "purify")
    (made,) = (folder / "purified-experts").iterdir()
    taken = [{**task, "expert": {"from": str(made / task["name"])}} for task in ready_settings["tasks"]]
    alone = rerun(ready_settings, name="taken", tasks=taken, merge=[])
    again = {row["model"]: row for row in csv.DictReader((alone / "results.csv").open())}
    for task in ("words", "more"):
        column = f"{task}/accuracy"
        assert float(rows["experts", "purified"][column]) == float(again["experts"][column])


def test_capture_with_random_tokens_reads_no_data(ready_settings, monkeypatch):
    from pave_lightning.pipeline.commands import run_stage
    from pave_lightning.tasks.data_module import TaskDataModule

    def read(self, split):
        pytest.fail(f"{split} is read")

    monkeypatch.setattr(TaskDataModule, "dataset", read)
    monkeypatch.setattr("pave_lightning.pipeline.planning.checks.tokenised_problems", lambda recipe, folder: ())
    settings = {**ready_settings, "capture": {"examples": 40, "batch_size": 8, "source": "random_tokens"}}
    recipe = Recipe.model_validate(settings)
    for stage in ("fit", "capture", "merge"):
        run_stage(recipe.model_copy(update={"merge": recipe.merge[1:]}), stage)
    statistics = TaskStatistics.load(Path(recipe.output) / "tiny" / "statistics" / "words" / "moments.safetensors")
    assert statistics.examples == 40
    assert "encoder.layer.1.output.dense" in statistics.layers()
    assert (Path(recipe.output) / "tiny" / "merged" / "emr-purified" / "manifest.json").is_file()


def test_a_stage_alone_says_what_it_lacks(recipe):
    from pave_lightning.pipeline.commands import run_stage

    with pytest.raises(PaveError, match="pave fit --task words"):
        run_stage(recipe, "capture", "words")
    run_stage(recipe, "fit")
    with pytest.raises(PaveError, match="pave capture --task words"):
        run_stage(recipe, "merge")
    with pytest.raises(PaveError, match="did you mean 'words'"):
        run_stage(recipe, "capture", "word")
    for stage in ("capture", "merge", "evaluate", "report"):
        run_stage(recipe, stage)
    assert (Path(recipe.output) / "tiny" / "results.csv").is_file()


@pytest.mark.usefixtures("finished")
def test_a_report_of_stale_scores_is_refused(recipe_settings):
    from pave_lightning.pipeline.commands import run_stage

    changed = {**recipe_settings, "merge": [{"method": "task_arithmetic", "scale": 0.9}, {"method": "emr"}]}
    with pytest.raises(PaveError, match="stale"):
        run_stage(Recipe.model_validate(changed), "report")


@pytest.mark.skipif(torch.cuda.is_available(), reason="shows what happens where there is no GPU")
def test_a_report_needs_no_device_of_the_machine_that_computed(recipe_settings, finished):
    from pave_lightning.pipeline.commands import run_stage

    (finished / "results.csv").unlink()
    trainer = {**recipe_settings["trainer"], "accelerator": "gpu"}
    computed = Recipe.model_validate({**recipe_settings, "trainer": trainer, "compute": {"device": "cuda"}})
    with pytest.raises(PaveError, match=r"(?s)trainer: .*gpu.*compute.device is cuda"):
        run_stage(computed, "evaluate")
    run_stage(computed, "report")
    assert (finished / "results.csv").is_file()


def test_an_error_ends_the_mlflow_run_as_failed(recipe, tracking_uri, monkeypatch):
    from mlflow import MlflowClient

    from pave_lightning.experts import fitting

    def explode(*args, **kwargs):
        raise RuntimeError("no")

    monkeypatch.setattr(fitting, "fit_expert", explode)
    with pytest.raises(RuntimeError):
        run_recipe(recipe)
    client = MlflowClient(tracking_uri)
    experiment = client.get_experiment_by_name("pave-lightning").experiment_id
    mine = [run for run in client.search_runs([experiment]) if str(recipe.output) in client_key(run)]
    assert [run.info.status for run in mine] == ["FAILED"]


@pytest.mark.slow
@pytest.mark.timeout(900)  # seven runs, one after the other
def test_killed_runs_go_on_and_end_like_an_undisturbed_one(recipe_settings, tmp_path):
    trainer = {**recipe_settings["trainer"], "max_epochs": 15}

    def start(name):
        path = tmp_path / f"{name}.yaml"
        path.write_text(recipe_to_yaml(Recipe.model_validate({**recipe_settings, "name": name, "trainer": trainer})))
        command = [sys.executable, "-m", "pave_lightning", "run", str(path)]
        options = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True, "cwd": tmp_path}
        # A shell that starts the tests in the background lets all that they start ignore Ctrl-C.
        options["preexec_fn"] = lambda: signal.signal(signal.SIGINT, signal.SIG_DFL)
        return subprocess.Popen(command, **options)

    def finish(process):
        output, _ = process.communicate(timeout=240)
        assert process.returncode == 0, output
        return output

    def results(name):
        return (Path(recipe_settings["output"]) / name / "results.csv").read_text()

    finish(start("whole"))
    for stop, code in ((signal.SIGKILL, -9), (signal.SIGTERM, 143), (signal.SIGINT, 130)):
        folder = Path(recipe_settings["output"]) / stop.name
        process = start(stop.name)
        deadline = time.monotonic() + 120
        while not list(folder.glob("training/*/*/last.ckpt")):
            assert process.poll() is None, process.stdout.read()
            assert time.monotonic() < deadline
            time.sleep(0.02)
        process.send_signal(stop)
        process.wait(60)
        assert process.returncode == code
        assert not (folder / "experts" / "numbers").exists()

        assert "goes on from its last checkpoint" in finish(start(stop.name))
        assert not [path for path in folder.rglob("*") if ".unfinished-" in path.name]
        assert results(stop.name) == results("whole")


@pytest.mark.slow
@pytest.mark.parametrize("strategy", ["ddp", "fsdp2"])
def test_two_processes_give_the_same_experts_statistics_and_scores_as_one(recipe_settings, tmp_path, strategy):
    # Long enough to learn: a correlation divides rounding by the spread of what an expert says.
    recipe_settings["trainer"]["max_epochs"] = 30
    folder = rerun(recipe_settings)
    # In a shared folder, whose stages the driver claims for all of its processes.
    two = {**recipe_settings, "name": "two", "shared": str(tmp_path / "shared")}
    two["trainer"] = {**two["trainer"], "devices": 2, "strategy": strategy}
    # The same experts, so that capture and evaluation can be compared with one process exactly.
    two["tasks"] = [
        {**task, "expert": {"from": str(folder / "experts" / task["name"])}} for task in recipe_settings["tasks"]
    ]
    path = tmp_path / "two.yaml"
    path.write_text(recipe_to_yaml(Recipe.model_validate(two)))
    command = [sys.executable, "-m", "pave_lightning", "run", str(path)]
    done = subprocess.run(
        command, cwd=tmp_path, capture_output=True, text=True, timeout=280, env={**os.environ, "OMP_NUM_THREADS": "1"}
    )
    assert done.returncode == 0, done.stdout + done.stderr

    other = folder.parent / "two"
    for task in ("words", "numbers"):
        (theirs,) = (tmp_path / "shared" / "statistics").glob(f"{task}-*/moments.safetensors")
        one = TaskStatistics.load(folder / "statistics" / task / "moments.safetensors")
        both = TaskStatistics.load(theirs)
        assert one.examples == both.examples == 32
        for layer in one.layers():
            assert one[layer].rows == both[layer].rows
            torch.testing.assert_close(one[layer].matrix, both[layer].matrix, rtol=1e-5, atol=1e-6)
    scores = [json.loads((place / "scores/experts/manifest.json").read_text())["result"] for place in (folder, other)]
    for task in ("words", "numbers"):
        first, second = (found["scores"][task] for found in scores)
        assert first["examples"] == second["examples"] == 30
        assert first["metrics"] == pytest.approx(second["metrics"], abs=1e-5)
        one, both = (
            read_predictions(place / "scores/experts/predictions.parquet")[0][task] for place in (folder, other)
        )
        assert one.same_rows(both)
        assert one.rows.tolist() == list(range(30))
        assert one.predictions == pytest.approx(both.predictions, abs=1e-5)


def test_data_that_changes_during_a_fit_makes_its_result_stale(recipe_settings, tmp_path, monkeypatch):
    from pave_lightning.experts import fitting
    from pave_lightning.pipeline.commands import run_stage
    from pave_lightning.pipeline.results import Results
    from pave_lightning.pipeline.run_folder import RunFolder
    from pave_lightning.pipeline.stages import FitStage

    train = tmp_path / "train.jsonl"
    words, numbers = recipe_settings["tasks"]
    train.write_text(Path(words["data"]["train"]).read_text())
    recipe = Recipe.model_validate(
        {**recipe_settings, "tasks": [{**words, "data": {**words["data"], "train": str(train)}}, numbers]}
    )
    fit_expert = fitting.fit_expert

    def fit_and_edit(*args, **kwargs):
        result = fit_expert(*args, **kwargs)
        train.write_text(train.read_text() + '{"text": "w1 w2", "label": 0}\n')
        return result

    monkeypatch.setattr(fitting, "fit_expert", fit_and_edit)
    run_stage(recipe, "fit", "words")
    results = Results(recipe, RunFolder(Path(recipe.output) / recipe.name))
    assert results.state(FitStage(results, recipe.task("words"))) == "stale"


def test_statistics_of_another_expert_are_refused_where_they_were_put(ready_settings):
    from pave_lightning.pipeline.commands import run_stage

    def merge(rho, stage="merge"):
        steps = [{"method": "average", "vectors": ["purified"], "purify": {"rho": rho}}]
        run_stage(Recipe.model_validate({**ready_settings, "merge": steps}), stage)

    for stage in ("fit", "capture", "merge"):
        merge(0.9, stage)
    folder = Path(ready_settings["output"]) / "tiny"
    own, other = (folder / "statistics" / task for task in ("words", "more"))
    shutil.copyfile(other / "moments.safetensors", own / "moments.safetensors")
    before = manifests(folder)
    file = own / "moments.safetensors"
    for stage in ("merge", "purify"):
        with pytest.raises(
            PaveError, match=rf"is damaged: {file} is not what was written .*`pave capture --task words"
        ):
            merge(0.8, stage)
    merge(0.9, "capture")
    merge(0.9)
    # Made anew they are what they were, so that what was made of them stays.
    assert changed(before, manifests(folder)) == {"statistics/words", "statistics/words.damaged-1"}
    assert (own.with_name("words.damaged-1") / "moments.safetensors").read_bytes() == (
        other / "moments.safetensors"
    ).read_bytes()
    merge(0.8)
    shutil.copyfile(other / "moments.safetensors", own / "moments.safetensors")
    # With the manifest that belongs to them they are another stage's.
    shutil.copyfile(other / "manifest.json", own / "manifest.json")
    with pytest.raises(PaveError, match=r"statistics/words is stale: .*pave capture --task words"):
        merge(0.8)
    file.unlink()
    merge(0.8, "capture")
    merge(0.8)


def test_statistics_are_captured_only_where_something_needs_them(ready_settings):
    average = {"method": "average", "vectors": ["plain"]}
    folder = rerun(ready_settings, merge=[average])
    assert (folder / "results.csv").is_file()
    assert not (folder / "statistics").exists()

    rerun(ready_settings, merge=[average, {"method": "average", "name": "again", "vectors": ["purified"]}])
    assert (folder / "statistics" / "words" / "moments.safetensors").is_file()
