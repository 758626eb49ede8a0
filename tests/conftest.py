"""Fixtures shared by all tests: one thread, no network, tiny random models on disk."""

import atexit
import hashlib
import logging
import os
import shutil
import signal
import sqlite3
import subprocess
import sys
import tempfile
import threading
from contextlib import closing
from pathlib import Path

os.environ.update(
    HF_HUB_OFFLINE="1",
    MLFLOW_DISABLE_TELEMETRY="true",
    DO_NOT_TRACK="true",
    TOKENIZERS_PARALLELISM="false",
    HF_ASSETS_CACHE=tempfile.mkdtemp(prefix="pave-tests-"),  # what plans remember of models
)

import pytest

atexit.register(shutil.rmtree, os.environ["HF_ASSETS_CACHE"], ignore_errors=True)

WORDS = tuple(f"w{index}" for index in range(96))
BERT = {
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 64,
    "max_position_embeddings": 32,
    "vocab_size": 100,
    "pad_token_id": 0,
}


@pytest.fixture(autouse=True)
def own_messages_are_seen():
    """What the command line makes of our logger ends with the test."""
    ours = logging.getLogger("pave_lightning")
    before = ours.level, list(ours.handlers), ours.propagate
    yield
    ours.setLevel(before[0])
    ours.handlers, ours.propagate = before[1:]


@pytest.fixture
def as_in_a_terminal():
    """Ctrl-C and SIGTERM end programs; a shell that starts the tests in the background lets them ignore Ctrl-C."""
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)}
    signal.signal(signal.SIGINT, signal.default_int_handler)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    signal.signal(signal.SIGHUP, signal.SIG_DFL)
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.fixture(scope="session", autouse=True)
def _one_thread():
    import torch

    torch.set_num_threads(1)


@pytest.fixture(scope="session")
def tiny_tokenizer():
    """A tokenizer of the words w0 to w95 and four special ones."""
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from tokenizers.pre_tokenizers import Whitespace
    from tokenizers.processors import TemplateProcessing
    from transformers import PreTrainedTokenizerFast

    special = {"pad_token": "[PAD]", "unk_token": "[UNK]", "cls_token": "[CLS]", "sep_token": "[SEP]"}
    words = [*special.values(), *WORDS]
    backend = Tokenizer(WordLevel({word: index for index, word in enumerate(words)}, unk_token="[UNK]"))
    backend.pre_tokenizer = Whitespace()
    backend.post_processor = TemplateProcessing(
        single="[CLS] $A [SEP]", pair="[CLS] $A [SEP] $B:1 [SEP]:1", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
    )
    names = ["input_ids", "token_type_ids", "attention_mask"]
    return PreTrainedTokenizerFast(tokenizer_object=backend, model_input_names=names, **special)


@pytest.fixture(scope="session")
def make_base(tmp_path_factory, tiny_tokenizer):
    """Write the folder of a tiny random BERT without head, names without prefix; with pooler unless told otherwise."""
    import torch
    from transformers import BertConfig, BertModel

    def build(*, seed=0, pooler=True, **config):
        folder = tmp_path_factory.mktemp("base")
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            model = BertModel(BertConfig(**{**BERT, **config}), add_pooling_layer=pooler)
        model.save_pretrained(folder)
        tiny_tokenizer.save_pretrained(folder)
        return folder

    return build


@pytest.fixture(scope="session")
def make_expert(tmp_path_factory, tiny_tokenizer):
    """Write the folder of a classifier whose backbone is the base plus seeded noise in every weight."""
    import torch
    from transformers import AutoModelForSequenceClassification
    from transformers.utils import logging

    def build(base, *, seed=1, num_labels=2, size=0.05, **saving):
        folder = tmp_path_factory.mktemp("expert")
        logging.set_verbosity_error()
        with torch.random.fork_rng(), torch.no_grad():
            torch.manual_seed(seed)
            model = AutoModelForSequenceClassification.from_pretrained(base, num_labels=num_labels)
            for parameter in model.parameters():
                parameter.add_(size * torch.randn_like(parameter))
        logging.set_verbosity_warning()
        model.save_pretrained(folder, **saving)
        tiny_tokenizer.save_pretrained(folder)
        return folder

    return build


@pytest.fixture(scope="session")
def base_folder(make_base):
    """One tiny base for all tests that only read it."""
    return make_base()


@pytest.fixture(scope="session")
def expert_folders(base_folder, make_expert):
    """Three experts of that base, with heads of different sizes; only to be read."""
    return {
        "first": make_expert(base_folder, seed=1, num_labels=2),
        "second": make_expert(base_folder, seed=2, num_labels=3),
        "third": make_expert(base_folder, seed=3, num_labels=1),
    }


@pytest.fixture
def hub_cache(tmp_path, monkeypatch):
    """Puts files into a hub cache as `hf download` leaves them; the hub itself is not asked."""
    import huggingface_hub

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "hub"))

    def keep(name, files, *, revision="main", folder=""):
        place = tmp_path / "hub" / f"models--{name.replace('/', '--')}"
        commit = hashlib.sha1(revision.encode()).hexdigest()
        (place / "refs").mkdir(parents=True, exist_ok=True)
        (place / "refs" / revision).write_text(commit)
        inside = place / "snapshots" / commit / folder
        inside.mkdir(parents=True, exist_ok=True)
        for file in files:
            shutil.copyfile(file, inside / file.name)
        return inside

    return keep


@pytest.fixture(scope="session")
def task_files(tmp_path_factory):
    """Rows of a task whose label is whether the first word's number is high; a model can learn it."""
    import json
    import random

    folder = tmp_path_factory.mktemp("rows")

    def write(name, rows, *, regression=False):
        draw = random.Random(f"{name}{rows}")
        lines = []
        for _ in range(rows):
            first = draw.randrange(96)
            text = " ".join(f"w{index}" for index in [first, *draw.choices(range(96), k=draw.randrange(2, 9))])
            label = first / 96 if regression else int(first >= 48)
            lines.append(json.dumps({"text": text, "label": label}))
        path = folder / f"{name}.jsonl"
        path.write_text("\n".join(lines) + "\n")
        return str(path)

    def build(kind="text_classification"):
        regression = kind == "regression"
        return {
            split: write(f"{kind}-{split}", rows, regression=regression)
            for split, rows in (("train", 48), ("validation", 24), ("test", 30))
        }

    return build


@pytest.fixture(scope="session")
def tag_files(tmp_path_factory):
    """Rows of words, each labelled by whether its number is high."""
    import json
    import random

    folder, draw = tmp_path_factory.mktemp("tags"), random.Random(0)
    files = {}
    for split, rows in (("train", 20), ("validation", 12), ("test", 12)):
        lines = []
        for _ in range(rows):
            numbers = draw.choices(range(96), k=draw.randrange(2, 7))
            lines.append({"words": [f"w{n}" for n in numbers], "labels": [int(n >= 48) for n in numbers]})
        (folder / f"{split}.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
        files[split] = str(folder / f"{split}.jsonl")
    return files


@pytest.fixture(scope="session")
def hasty_databases():
    """Let databases not wait until the disk has what they write, for the end of the tests is the end of them."""
    from sqlalchemy import event
    from sqlalchemy.engine import Engine

    event.listen(Engine, "connect", lambda connection, _: connection.execute("PRAGMA synchronous=OFF"))


@pytest.fixture(scope="session")
def migrated(hasty_databases, tmp_path_factory):
    """An MLflow database with all tables and no experiment of ours, to be copied: making one takes seconds."""
    from pave_lightning.tracking.stores import connect

    path = tmp_path_factory.mktemp("mlflow") / "mlflow.db"
    connect(f"sqlite:///{path}").search_experiments()
    return path


@pytest.fixture(scope="session")
def new_database(migrated):
    """Write an MLflow database with all tables and no runs."""

    def copy(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        with closing(sqlite3.connect(migrated)) as source, closing(sqlite3.connect(path)) as target:
            source.backup(target)
        return path

    return copy


@pytest.fixture(scope="session")
def tracking_uri(new_database, tmp_path_factory):
    """One MLflow database for all tests that run recipes."""
    return f"sqlite:///{new_database(tmp_path_factory.mktemp('mlflow') / 'mlflow.db')}"


@pytest.fixture(scope="session")
def settings_in(base_folder, task_files, tracking_uri):
    """A recipe with its output in a folder, as plain values, that runs in seconds: two tasks, two merge methods."""
    words = {"data": task_files(), "text": "text", "classes": ["low", "high"]}
    numbers = {"data": task_files("regression"), "text": "text", "kind": "regression", "value_range": [0.0, 1.0]}

    def build(output):
        return {
            "name": "tiny",
            "base": str(base_folder),
            "output": str(output),
            "trainer": {"max_epochs": 2, "accelerator": "cpu", "enable_progress_bar": False, "log_every_n_steps": 2},
            "training": {"learning_rate": 1e-3, "batch_size": 16, "max_length": 16},
            "tasks": [{"name": "words", **words}, {"name": "numbers", **numbers}],
            "capture": {"examples": 32},
            "purify": {"rho": 0.9},
            "merge": [
                {"method": "task_arithmetic", "scale": {"search": [0.2, 0.6], "points": 2, "examples": 12}},
                {"method": "emr"},
            ],
            "tracking": {"uri": tracking_uri},
        }

    return build


@pytest.fixture(scope="session")
def ready_settings_in(settings_in, base_folder, make_expert, expert_folders):
    """The same recipe with experts that exist already, two of classification, so that nothing is trained."""
    other = make_expert(base_folder, seed=5)

    def build(output):
        settings = settings_in(output)
        words, _ = settings["tasks"]
        tasks = [
            {**words, "expert": {"from": str(expert_folders["first"])}},
            {**words, "name": "more", "expert": {"from": str(other)}},
        ]
        return {**settings, "tasks": tasks}

    return build


@pytest.fixture
def recipe_settings(settings_in, tmp_path):
    """That recipe, with its output in this test's folder."""
    return settings_in(tmp_path / "runs")


@pytest.fixture
def ready_settings(ready_settings_in, tmp_path):
    """The recipe with experts that exist already, with its output in this test's folder."""
    return ready_settings_in(tmp_path / "runs")


@pytest.fixture(scope="session")
def run_once(settings_in, tmp_path_factory):
    """What a whole run of the recipe leaves; to be copied, not to be worked in."""
    from pave_lightning import Recipe, run_recipe

    return run_recipe(Recipe.model_validate(settings_in(tmp_path_factory.mktemp("run"))))


@pytest.fixture
def finished(run_once, recipe_settings):
    """A copy of a whole run where this test's recipe has its output."""
    return Path(shutil.copytree(run_once, Path(recipe_settings["output"]) / recipe_settings["name"]))


@pytest.fixture
def ready_runner():
    """Makes a runner for a recipe whose experts and statistics are there."""
    from pave_lightning.pipeline.commands import open_folder
    from pave_lightning.pipeline.context import Context
    from pave_lightning.pipeline.results import Results
    from pave_lightning.pipeline.runner import Runner
    from pave_lightning.pipeline.stages import CaptureStage, FitStage

    def build(recipe):
        runner = Runner(Context(Results(recipe, open_folder(recipe))))
        runner.run([*FitStage.all(runner.results), *CaptureStage.all(runner.results)])
        return runner

    return build


@pytest.fixture
def choose():
    """What a merge step comes to for a runner, once what it needs is there."""
    from pave_lightning.pipeline.stages.merge import MergeStage, chooser

    def choice(runner, step, vectors):
        for stage in MergeStage(runner.results, step, vectors).needs():
            runner.make(stage)
        return chooser(runner.context).choose(step, vectors)

    return choice


@pytest.fixture
def averages(monkeypatch):
    """Let the averages on validation data be known values, one after the other."""
    from pave_lightning.evaluation.scale_search import ScaleSearcher

    def give(*values):
        left = iter(values)
        monkeypatch.setattr(ScaleSearcher, "average", lambda self, candidate, examples: next(left))

    return give


@pytest.fixture(scope="session")
def packed():
    """Write the file of what a task keeps: masks, low-rank factors, and a rescaler."""
    from pave_lightning.merging.modulators import ModulatorWriter

    def write(path, masks, rescaler, factors=()):
        kept = ModulatorWriter()
        for name, mask in masks.items():
            kept.add_mask(name, mask)
        for name, pair in dict(factors).items():
            kept.add_factors(name, pair)
        kept.save(path, rescaler)

    return write


@pytest.fixture
def write_recipe(tmp_path):
    """Writes a text as the recipe of this test."""

    def write(text):
        path = tmp_path / "recipe.yaml"
        path.write_text(text, encoding="utf-8")
        return path

    return write


@pytest.fixture
def read_recipe(write_recipe):
    """Writes a text as the recipe of this test and reads it with overrides."""
    from pave_lightning.recipe.loading import load_recipe

    return lambda text, *overrides: load_recipe(write_recipe(text), overrides)


@pytest.fixture
def recipe_problems(write_recipe):
    """What is told about a recipe that cannot be used, one text a problem, in words for people."""
    from pave_lightning.errors import PaveError
    from pave_lightning.recipe.loading import load_recipe

    def problems(text, *overrides):
        path = write_recipe(text)
        with pytest.raises(PaveError) as caught:
            load_recipe(path, overrides)
        headline, *lines = str(caught.value).splitlines()
        assert headline == f"the recipe {path} cannot be used:"
        for jargon in ("Input should", "pydantic", "https:", "type=", "valid ", "validator", "str]", "literal"):
            assert jargon not in str(caught.value)
        return [line.removeprefix("  - ") for line in lines]

    return problems


@pytest.fixture
def schema_errors():
    """What a validator of JSON schemas tells of a recipe's text."""
    from ruamel.yaml import YAML

    from pave_lightning.recipe.loading import recipe_schema

    jsonschema = pytest.importorskip("jsonschema")
    validator = jsonschema.Draft202012Validator(recipe_schema())
    return lambda text: [error.message for error in validator.iter_errors(YAML(typ="safe", pure=True).load(text))]


MEASURED = """
import resource, sys
from pave_lightning.cli import main
code = main(sys.argv[1:])
usage = resource.getrusage(resource.RUSAGE_SELF)
# Not the maximum that the system keeps for the process, which counts what started it, too.
peak = int(open("/proc/self/status").read().partition("VmHWM:")[2].split()[0]) >> 10
print(code, "torch" in sys.modules, peak, usage.ru_utime + usage.ru_stime)
"""


@pytest.fixture(scope="session")
def measured():
    """Runs a command in a folder: exit code, whether torch was loaded, peak in MiB, seconds of the processor."""

    def run(folder, *arguments):
        command = [sys.executable, "-c", MEASURED, *arguments]
        done = subprocess.run(command, capture_output=True, text=True, cwd=folder, env=dict(os.environ), timeout=120)
        assert "Traceback" not in done.stderr
        code, torch, peak, seconds = done.stdout.split()[-4:]
        return int(code), torch == "True", int(peak), float(seconds)

    return run


@pytest.fixture(scope="session")
def assert_same_weights():
    """Fails unless two folders hold the same tensors to the bit, however weights are divided into shards."""
    from safetensors.torch import load_file

    def tensors(folder):
        found = {}
        for file in sorted(folder.rglob("*.safetensors")):
            place = "model" if file.name.startswith("model") else file.name
            where = str(file.parent.relative_to(folder)), place
            found |= {(*where, name): tensor for name, tensor in load_file(file).items()}
        return found

    def check(one, other):
        first, second = tensors(one), tensors(other)
        assert first
        assert first.keys() == second.keys()
        differing = [key for key in first if first[key].dtype != second[key].dtype or not first[key].equal(second[key])]
        assert differing == []

    return check


@pytest.fixture
def in_processes(tmp_path):
    """Calls a function for each of some processes, which are threads here; what each of them gives, in order."""
    from pave_lightning.system.process_groups import ProcessGroup, _packed, _unpacked

    class ThreadGroup(ProcessGroup):
        """Threads in place of processes: they are told the same, by the same bytes."""

        def __init__(self, rank, folder, told, barrier):
            self.rank, self.size, self.folder = rank, len(told), folder
            self._told, self._barrier = told, barrier

        def gather(self, own):
            self._told[self.rank] = _packed(own)
            self._barrier.wait()
            found = [_unpacked(packed) for packed in self._told]
            self._barrier.wait()
            return found

    def run(size, work):
        folder = tmp_path / f"meeting-{size}"
        folder.mkdir(exist_ok=True)
        barrier, told = threading.Barrier(size), [b""] * size
        found, failed = [None] * size, []

        def one(rank):
            try:
                found[rank] = work(ThreadGroup(rank, folder, told, barrier))
            except threading.BrokenBarrierError:
                pass
            except BaseException as error:
                failed.append(error)
                barrier.abort()

        threads = [threading.Thread(target=one, args=(rank,)) for rank in range(size)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        if failed:
            raise failed[0]
        return found

    return run
