"""Every reader of files, fed with broken ones: a result or a message for the user, never another error."""

import json
import random
import shutil
import struct

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from pave_lightning.errors import PaveError
from pave_lightning.experts.adapters import load_adapter_alone
from pave_lightning.experts.loading import load_expert
from pave_lightning.merging.folders import load_merged, merged_facts
from pave_lightning.merging.modulators import LowRank, Modulator
from pave_lightning.pipeline.run_folder import RunFolder
from pave_lightning.recipe.loading import load_recipe
from pave_lightning.statistics import LayerMoment, NormMoment, TaskStatistics
from pave_lightning.statistics.gradients import TaskGradients
from pave_lightning.tasks.task import Task
from pave_lightning.tasks.tokenizers import load_tokenizer
from pave_lightning.weights import Adapter, Architecture, Checkpoint
from pave_lightning.weights.adapter_models import adapter_problems

TASK = Task.model_validate({"name": "t", "data": {}, "text": "text", "classes": 2})
RECIPE = "name: demo\nbase: folder\ntasks: [pocket/movie, {use: pocket/isa, text: [a, b], classes: [x, y]}]\n"
RECIPE += (
    "merge: [{method: ties, scale: {search: [0, 1]}, tune: {density: [0.1, 0.2]}}]\nseed: &a 3\ncapture: {rows: *a}\n"
)


def read_architecture(folder):
    found = Architecture.of_folder(folder)
    return found.vocabulary, found.positions


def read_weights(folder):
    checkpoint = Checkpoint(folder, "bert")
    return checkpoint.non_finite(), checkpoint.head_tensors()


def read_adapter(folder):
    adapter = Adapter(folder, "bert")
    return adapter_problems(folder), [adapter.factors(layer) for layer in adapter.layers]


def read_statistics(folder):
    found = TaskStatistics.load(folder / "moments.safetensors")
    return [(found[name], found.seen(name), found.owner(name)) for name in found], [found.norms[n] for n in found.norms]


def read_gradients(folder):
    found = TaskGradients.load(folder / "gradients.safetensors")
    return [(found.read(name), found.shape(name)) for name in found]


def read_modulator(folder):
    found = Modulator(folder / "modulator.safetensors")
    return [found.apply(name, torch.ones(3, 3)) for name in found]


def read_manifest(folder):
    found = RunFolder(folder).manifest("stage")
    return found and found.digest()


READERS = {
    ("expert", "config.json"): read_architecture,
    ("expert", "tokenizer.json"): load_tokenizer,
    ("expert", "tokenizer_config.json"): load_tokenizer,
    ("expert", "model.safetensors"): read_weights,
    ("sharded", "model.safetensors.index.json"): read_weights,
    ("adapter", "adapter_config.json"): read_adapter,
    ("adapter", "adapter_model.safetensors"): read_adapter,
    ("made", "moments.safetensors"): read_statistics,
    ("made", "gradients.safetensors"): read_gradients,
    ("made", "modulator.safetensors"): read_modulator,
    ("made", "pave.json"): merged_facts,
    ("made", "stage/manifest.json"): read_manifest,
    ("made", "recipe.yaml"): lambda folder: load_recipe(folder / "recipe.yaml"),
}
SLOW_READERS = {
    ("expert", "config.json"): lambda folder: load_expert(folder, TASK),
    ("expert", "model.safetensors"): lambda folder: load_expert(folder, TASK),
    ("adapter", "adapter_config.json"): lambda folder: load_adapter_alone(folder.parent / "expert", folder, "t"),
    ("adapter", "adapter_model.safetensors"): lambda folder: load_adapter_alone(folder.parent / "expert", folder, "t"),
    ("made", "pave.json"): lambda folder: load_merged(folder, "t"),
}


VALUES = (
    None,
    True,
    -1,
    0,
    3,
    2**31,
    10**30,
    1e400,
    -1e400,
    float("nan"),
    0.5,
    "",
    "x",
    "../../etc/passwd",
    [],
    {},
    [[]],
)
VALUES += ([None], {"": None}, "\x1b[31m", "\ud800", [1, "x"], 1e39)


def broken(content, random):
    """Bytes that were made from a file's by one to three faults; structured where they are JSON or safetensors."""
    for _ in range(random.choice((1, 1, 1, 2, 3))):
        content = random.choice((_bytes, _structure, _structure, _structure))(content, random)
    return content


def _bytes(content, random):
    kind = random.randrange(5)
    if kind == 0 or not content:
        return random.choice((b"", b"null", b"[]", b"{}", b"\xff\xfe", b"[" * 100_000, b"{" + b'"a":{' * 50_000))
    place = random.randrange(len(content))
    if kind == 1:
        return content[:place]
    if kind == 2:
        return content[:place] + random.randbytes(random.randrange(1, 9)) + content[place + 4 :]
    if kind == 3:
        return content + content[:place]
    flipped = bytearray(content)
    flipped[place] ^= 1 << random.randrange(8)
    return bytes(flipped)


def _structure(content, random):
    try:
        return _text(mutated(json.loads(content), random))
    except (ValueError, RecursionError):
        pass
    try:
        (length,) = struct.unpack("<Q", content[:8])
        header = json.loads(content[8 : 8 + length])
    except (ValueError, struct.error, RecursionError, OverflowError):
        return _bytes(content, random)
    inner = header.get("__metadata__") if isinstance(header, dict) else None
    if isinstance(inner, dict) and inner and random.random() < 0.6:  # JSON inside of JSON
        key = random.choice(sorted(inner))
        try:
            inner[key] = _text(mutated(json.loads(inner[key]), random)).decode()
        except (ValueError, TypeError, RecursionError):
            inner[key] = random.choice(("", "x", "nan", "1e999", "{}", "[]"))
    else:
        header = mutated(header, random)
    text = _text(header)
    return struct.pack("<Q", len(text)) + text + content[8 + length :]


def _text(value):
    return json.dumps(value).encode()


def mutated(value, random):
    """JSON values with one place changed: another value, a key less, a key more, a copy elsewhere."""
    if not isinstance(value, dict | list) or not value or random.random() < 0.08:
        return random.choice(VALUES)
    keys = sorted(value) if isinstance(value, dict) else range(len(value))
    key = random.choice(keys)
    kind = random.randrange(8)
    if kind == 0:
        del value[key]
    elif kind == 1:
        value[key] = random.choice(VALUES)
    elif kind == 2 and isinstance(value, dict):
        value[random.choice(("x", "", key + "x"))] = value[key]
    elif kind == 3:
        value[key] = value[random.choice(keys)]
    else:
        value[key] = mutated(value[key], random)
    return value


@pytest.fixture(scope="module")
def good(tmp_path_factory, make_base, make_expert, packed):
    """A folder of folders with one good file of every kind."""
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForSequenceClassification

    root = tmp_path_factory.mktemp("good")
    base = make_base(hidden_size=8, num_hidden_layers=1, intermediate_size=8)
    make = make_expert(base)
    shutil.copytree(make, root / "expert")
    model = AutoModelForSequenceClassification.from_pretrained(make)
    model.save_pretrained(root / "sharded", max_shard_size="3KB")
    config = LoraConfig(task_type="SEQ_CLS", r=2, target_modules=["query"], modules_to_save=["classifier"])
    get_peft_model(model, config).save_pretrained(root / "adapter")
    made = root / "made"
    shared, norm = LayerMoment("input", torch.eye(4), 30), NormMoment(torch.ones(4), 5, 9)
    statistics = TaskStatistics({"a": shared, "b": shared}, examples=7, metadata={"task": "t"}, norms={"n": norm})
    statistics.save(made / "moments.safetensors")
    TaskGradients("fisher", {"a": torch.ones(3, 3)}, examples=3).save(made / "gradients.safetensors")
    factors = {"y": LowRank(torch.ones(3, 1), torch.ones(1, 3))}
    packed(made / "modulator.safetensors", {"x": torch.ones(3, 3, dtype=torch.bool)}, 1.5, factors)
    (made / "pave.json").write_text('{"method": "opcm", "form": "static", "base": "b", "options": {}, "scale": 1.0}')
    (made / "recipe.yaml").write_text(RECIPE)
    with RunFolder(made).writing("stage", {"a": 1}) as writer:
        (writer.path / "file").write_text("content")
        writer.result["score"] = 0.5
    return root


def check(good, reader, where, seed, tmp_path_factory):
    """Read a broken file; what is neither a result nor a `PaveError` fails the test."""
    folder, name = where
    place = tmp_path_factory.getbasetemp() / "broken" / folder
    if not place.is_dir():
        shutil.copytree(good, place.parent, dirs_exist_ok=True)
    content = (good / folder / name).read_bytes()
    try:
        (place / name).write_bytes(broken(content, random.Random(seed)))
        try:
            reader(place)
        except PaveError as error:
            assert str(error).strip()  # noqa: PT017
    finally:
        (place / name).write_bytes(content)


def fuzzed(readers, examples):
    def decorate(function):
        several = settings(
            max_examples=examples,
            derandomize=True,
            deadline=None,
            database=None,
            suppress_health_check=list(HealthCheck),
        )
        named = pytest.mark.parametrize("where", readers, ids="/".join)
        return named(several(given(seed=st.integers(0, 2**32 - 1))(function)))

    return decorate


@pytest.mark.parametrize("where", READERS, ids="/".join)
def test_good_files_are_read(good, where):
    READERS[where](good / where[0])


@fuzzed(READERS, 15)
def test_broken_files(good, where, seed, tmp_path_factory):
    check(good, READERS[where], where, seed, tmp_path_factory)


@pytest.mark.slow
@fuzzed(READERS, 300)
def test_many_broken_files(good, where, seed, tmp_path_factory):
    check(good, READERS[where], where, f"more {seed}", tmp_path_factory)


@pytest.mark.slow
@fuzzed(SLOW_READERS, 100)
def test_many_broken_models(good, where, seed, tmp_path_factory):
    check(good, SLOW_READERS[where], where, f"model {seed}", tmp_path_factory)


@pytest.mark.parametrize("where", READERS, ids="/".join)
@pytest.mark.parametrize("kind", ["folder", "loop", "empty"])
def test_what_is_no_file(good, where, kind, tmp_path):
    place = shutil.copytree(good / where[0], tmp_path / "place")
    file = place / where[1]
    file.unlink()
    if kind == "folder":
        file.mkdir()
    elif kind == "loop":
        file.symlink_to(file)
    else:
        file.touch()
    if where[1].endswith("manifest.json"):
        assert READERS[where](place) is None
    else:
        with pytest.raises(PaveError):
            READERS[where](place)
