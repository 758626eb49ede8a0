"""What is predicted of memory, time and disk, against what is measured and counted by hand."""

import json
import math
import mmap
import os
import subprocess
import sys
import time

import pytest

from pave_lightning.merging import make_method
from pave_lightning.merging.methods.emr import Emr
from pave_lightning.merging.methods.task_arithmetic import TaskArithmetic
from pave_lightning.pipeline import costs
from pave_lightning.purification.options import Purify
from pave_lightning.weights import Parameter, ParameterKind, memory

LINUX = pytest.mark.skipif(not memory.STATUS.is_file(), reason="measures by /proc")


@pytest.fixture(autouse=True)
def _nothing_remembered(tmp_path, monkeypatch):
    monkeypatch.setattr("huggingface_hub.utils._cache_assets.HF_ASSETS_CACHE", str(tmp_path / "assets"))


def linear(name, height, width):
    return Parameter(f"{name}.weight", ParameterKind.LINEAR, (height, width), 1)


PARAMETERS = [
    Parameter("embeddings.weight", ParameterKind.EMBEDDING, (1000, 20)),
    Parameter("embeddings.norm.weight", ParameterKind.NORM_SCALE, (20,)),
    linear("query", 20, 20),
    linear("key", 20, 20),
    linear("wide", 60, 20),
    linear("narrow", 20, 60),
    Parameter("turned.weight", ParameterKind.LINEAR, (20, 60), 0),
]
TOTAL = 1000 * 20 + 20 + 2 * 400 + 3 * 1200


def predict(**changes):
    kinds = costs.expected_kinds(PARAMETERS, changes.pop("moments", "smallest"))
    settings = {"options": Purify(), "methods": [TaskArithmetic()], **changes}
    return costs.predict_cost(PARAMETERS, settings.pop("tasks", 4), settings.pop("workers", 2), kinds, **settings)


def test_kinds_follow_from_shapes():
    kinds = costs.expected_kinds(PARAMETERS, "smallest")
    assert kinds == {"query": "input", "key": "input", "wide": "input", "narrow": "cross", "turned": "input"}
    assert costs.expected_kinds(PARAMETERS, "output")["narrow"] == "output"
    assert set(costs.expected_kinds(PARAMETERS, "input").values()) == {"input"}


def test_layers_are_counted_by_shape_and_kind():
    found = {(layer.shape, layer.kind): layer for layer in predict().layers}
    assert {key: layer.layers for key, layer in found.items()} == {
        ((20, 20), "input"): 2,
        ((60, 20), "input"): 2,
        ((20, 60), "cross"): 1,
    }
    assert all(layer.tasks == 4 and layer.seconds > 0 for layer in found.values())
    assert all(layer.tasks == 1 for layer in predict(options=Purify(tasks=["a"]), timed=False).layers)
    identity = predict(options=Purify(metric="identity"), timed=False).layers
    assert {layer.kind for layer in identity} == {None}


def test_the_slowest_comes_first_and_the_total_is_the_sum():
    cost = predict()
    seconds = [layer.seconds for layer in cost.layers]
    assert seconds == sorted(seconds, reverse=True)
    assert cost.seconds == sum(seconds)
    assert math.isnan(predict(timed=False).seconds)
    plain = predict(options=None)
    assert plain.layers == ()
    assert plain.seconds == 0


def test_disk_is_counted_by_hand():
    moments = {"query": 400, "key": 400, "wide": 400, "narrow": 1200, "turned": 400}
    purified = 2 * 400 + 3 * 1200
    assert predict(timed=False).disk_bytes == 4 * 4 * (sum(moments.values()) + purified) + 4 * TOTAL
    captured = 4 * 4 * sum(moments.values())
    assert predict(options=None, timed=False).disk_bytes == captured + 4 * TOTAL
    assert predict(options=None, methods=[], new_experts=3, timed=False).disk_bytes == captured + 3 * 4 * TOTAL
    masks = 4 * sum(math.ceil(parameter.elements / 8) for parameter in PARAMETERS)
    assert predict(options=None, methods=[Emr()], timed=False).disk_bytes == captured + 4 * TOTAL + masks
    nothing_captured = costs.predict_cost(PARAMETERS, 4, 2, {}, methods=[TaskArithmetic()])
    assert nothing_captured.disk_bytes == 4 * TOTAL


def test_memory_grows_with_tasks_and_workers_but_not_with_depth():
    def peak(tasks, workers, parameters):
        kinds = costs.expected_kinds(parameters, "smallest")
        found = costs.predict_cost(parameters, tasks, workers, kinds, options=Purify(), timed=False)
        return found.peak_bytes - found.baseline_bytes

    block = [linear(f"{index}.{side}", *shape) for index in range(2) for side, shape in enumerate([(768, 3072)] * 4)]
    deep = [linear(f"{index}.{side}", *shape) for index in range(20) for side, shape in enumerate([(768, 3072)] * 4)]
    assert peak(4, 1, block) < peak(4, 2, block) < peak(8, 2, block)
    assert peak(8, 2, deep) == peak(8, 2, block)
    assert peak(8, 2, deep) < 8 * sum(4 * parameter.elements for parameter in deep) / 5


def test_layers_go_together_where_workers_outnumber_tasks():
    small, large = ((96, 96), "input"), ((96, 384), "cross")
    # Two tasks of two layers side by side, and two workers with one task of each of four equal layers.
    assert costs.batch_bytes([small, small], 2, 4) == costs.batch_bytes([small], 4, 4)
    assert costs.batch_bytes([small], 2, 2) < costs.batch_bytes([small, large], 1, 2)
    assert costs.batch_bytes([small, large], 1, 2) < costs.batch_bytes([large], 2, 2)
    alone = predict(tasks=1, workers=1, timed=False)
    together = predict(tasks=1, workers=3, timed=False)
    held = [cost.peak_bytes - cost.baseline_bytes for cost in (alone, together)]
    assert held[1] - 3 * costs.THREAD_BYTES > held[0] - costs.THREAD_BYTES
    assert [layer.peak_bytes for layer in together.layers] != [layer.peak_bytes for layer in alone.layers]


def test_layers_that_go_together_take_less_time(monkeypatch):
    monkeypatch.setattr(costs, "solve_seconds", lambda *given: 1.0)
    assert predict(tasks=1, workers=1).seconds == 5
    assert predict(tasks=1, workers=2).seconds == pytest.approx(5 / 2)
    assert predict(tasks=3, workers=2).seconds == 5 * 2
    assert predict(tasks=2, workers=3).seconds == 5 * 2 / 2


def test_a_writer_holds_a_shard_or_one_large_tensor():
    sizes = [linear(str(index), 1, elements) for index, elements in enumerate([10, 10, 10, 50, 5])]
    assert max(costs.waiting_bytes(sizes, 100)) == 200
    assert max(costs.waiting_bytes(sizes[:3], 80)) == 80
    assert costs.waiting_bytes(sizes, 80) == [40, 80, 40, 200, 20]
    assert costs.waiting_bytes(sizes, 10_000)[-1] == 4 * 85
    assert costs.waiting_bytes([], 100) == []


@pytest.mark.parametrize(
    ("shape", "kind"),
    [
        ((20_000, 5_000), "input"),
        ((5_000, 20_000), "input"),
        ((200_000, 64), "input"),
        ((64, 200_000), "cross"),
        ((2, 90_000), "input"),
    ],
)
def test_large_layers_are_timed_on_small_ones(shape, kind):
    start = time.process_time()
    assert costs.solve_seconds(shape, kind, Purify(), 1) > 0.05
    assert time.process_time() - start < 5


@pytest.mark.parametrize(
    ("shape", "kind"), [((512, 512), "input"), ((1600, 400), "input"), ((400, 1600), "cross"), ((2048, 512), "input")]
)
def test_the_predicted_time_is_about_the_measured_one(monkeypatch, shape, kind):
    import torch

    from pave_lightning.subspace import knowledge_spectrum, one_blas_thread, project

    # A quarter of the work of the real solves, or less; processor time, which a busy machine does not stretch.
    monkeypatch.setattr(costs, "TIMED_WORK", 5 * 240**3)
    monkeypatch.setattr(costs.time, "perf_counter", time.process_time)
    predicted = min(costs.solve_seconds(shape, kind, Purify(), 1) for _ in range(2))
    generator = torch.Generator().manual_seed(1)
    weight = torch.randn(shape, generator=generator)
    rows = torch.randn(2 * shape[1], shape[1], generator=generator)
    moment = rows.T @ rows / len(rows)
    moment = weight @ moment if kind == "cross" else moment
    measured = []
    for _ in range(4):
        start = time.process_time()
        with one_blas_thread():
            project(weight, knowledge_spectrum(weight, moment, kind, damping=0.1), round(0.97 * min(shape)))
        measured.append(time.process_time() - start)
    assert 1 / 3 < predicted / min(measured) < 3


def test_purifications_add_up_in_time_and_disk_but_not_in_memory():
    first, second = Purify(metric="identity"), Purify(scope="global", exact=True, tasks=["a"])
    alone = [predict(options=one) for one in (first, second)]
    both = predict(options=[first, second])
    assert [(layer.options, layer.shape) for layer in both.layers[:3]] == [
        (first, layer.shape) for layer in both.layers[:3]
    ]
    assert {layer.kind for layer in both.layers} == {None, "input", "cross"}
    assert both.seconds == sum(layer.seconds for layer in both.layers) > 0
    weights = 4 * (2 * 400 + 3 * 1200)
    assert both.disk_bytes - alone[0].disk_bytes == weights
    peaks = [cost.peak_bytes - cost.baseline_bytes for cost in (*alone, both)]
    assert peaks[2] == max(peaks[:2])
    assert peaks[0] != peaks[1]


def test_times_are_kept_for_other_plans_of_this_machine_for_a_while(monkeypatch, tmp_path):
    calls = []
    monkeypatch.setattr(costs, "solve_seconds", lambda *given: calls.append(given) or float(len(calls)))
    first = predict()
    assert len(calls) == 3  # shapes
    assert predict() == first
    assert len(calls) == 3
    predict(workers=1)  # other threads
    predict(options=Purify(metric="root"))
    assert len(calls) == 3 + 3 + 3
    monkeypatch.setattr(costs, "_machine", lambda: ["another"])
    predict()
    assert len(calls) == 9 + 3
    for file in (tmp_path / "assets").rglob("*.json"):
        os.utime(file, (time.time() - 3601,) * 2)
    assert predict().seconds != first.seconds
    assert len(calls) == 12 + 3


def test_ratios_close_to_each_other_are_timed_once(monkeypatch):
    calls = []
    monkeypatch.setattr(costs, "solve_seconds", lambda *given: calls.append(given) or 1.0)
    close = [Purify(rho=rho) for rho in (0.97, 0.984, 0.992)]
    found = predict(options=close)
    assert len(calls) == 3  # shapes
    assert len(found.layers) == 9
    predict(options=[*close, Purify(rho=0.5), Purify(metric="root")])
    assert len(calls) == 3 + 2 * 3


@pytest.mark.parametrize("statistics", ["random", "task_vector"])
def test_moments_that_are_made_are_those_of_all_inputs(statistics):
    options = Purify(statistics=statistics)
    found = costs.predict_cost(PARAMETERS, 4, 2, {"wide": "input"}, options=options, timed=False)
    assert {layer.kind for layer in found.layers} == {"input"}
    assert sum(layer.layers for layer in found.layers) == 5
    made, read = (costs.batch_bytes([((768, 3072), "input")], 4, 2, one) for one in (options, None))
    # On top of a moment of 3072 x 3072 come twice as many rows, or the moment in float64 twice.
    assert made >= 2 * 4 * 4 * 3072**2
    assert read != made
    assert costs.solve_seconds((8, 24), "input", options, 2) > 0


def test_convolutions_that_are_captured_are_purified():
    patches = Parameter("patches.weight", ParameterKind.CONVOLUTION, (20, 3, 4, 4), 1)
    overlapping = Parameter("overlapping.weight", ParameterKind.CONVOLUTION, (20, 3, 3, 3))
    parameters = [*PARAMETERS, patches, overlapping]
    assert costs.expected_kinds(parameters, "smallest") == costs.expected_kinds(PARAMETERS, "smallest")
    kinds = costs.expected_kinds(parameters, "smallest", convolutions=True)
    assert kinds == {**costs.expected_kinds(PARAMETERS, "smallest"), "patches": "cross"}

    def count(options):
        layers = costs.predict_cost(parameters, 2, 1, kinds, options=options, timed=False).layers
        return sum(layer.layers for layer in layers)

    assert count(Purify()) == 6
    # Without statistics only linear layers are known to be matrices that can be purified.
    assert count(Purify(metric="identity")) == count(Purify(statistics="random")) == 5


@pytest.mark.parametrize("kind", ["input", "cross", "rows", None])
@pytest.mark.parametrize("shape", [(8, 8), (8, 24), (24, 8), (1, 1)])
def test_every_kind_of_moment_can_be_timed(kind, shape):
    assert costs.solve_seconds(shape, kind, Purify(metric="covariance" if kind else "identity"), 2) > 0


@LINUX
def test_what_this_process_holds():
    size, before = 100_000_000, memory.resident_bytes()
    with mmap.mmap(-1, size) as held:  # pages of its own, whatever was freed before and could be used again
        for _ in range(size >> 20):
            held.write(bytes(1 << 20))
        assert memory.resident_bytes() - before == pytest.approx(size, rel=0.1)
        assert memory.highest_resident_bytes() >= memory.resident_bytes() - 1_000_000


MEASURE = """
import json, os, sys
from pathlib import Path
import torch
from safetensors.torch import save_file
from pave_lightning.pipeline import costs
from pave_lightning.weights import memory
from pave_lightning.merging import make_method
from pave_lightning.merging.folders import MergeContext, write_merged
from pave_lightning.purification import PurifiedTaskVectors, StoredPurification, write_purified
from pave_lightning.purification.options import Compute, Purify
from pave_lightning.statistics import TaskStatistics
from pave_lightning.weights import Architecture, Checkpoint, ExpertTaskVectors

folder, moments = Path(sys.argv[1]), sys.argv[3]
name, *given = sys.argv[2].split()
method = make_method(name, {key: True for key in given})
options = Purify(**json.loads(sys.argv[4])) if moments else None
names = sorted(path.name for path in folder.glob("expert-*"))
architecture = Architecture.of_folder(folder / names[0])
base = Checkpoint(folder / "base", architecture.prefix)
experts = {name: Checkpoint(folder / name, architecture.prefix) for name in names}
source = plain = ExpertTaskVectors(base, experts, architecture)
kept = moments or "smallest"
statistics = {name: TaskStatistics.load(folder / f"statistics-{kept}-{name}.safetensors") for name in names}
kinds = {layer: own.kind(layer) for own in statistics.values() for layer in own.layers()}
cost = costs.predict_cost(plain.parameters, len(names), 2, kinds, options=options, methods=[method])
out = folder / f"out-{method.name}-{os.getpid()}"
if moments:
    write_purified(PurifiedTaskVectors(plain, statistics, options, Compute(workers=2)), out / "purified")
    purified = options.tasks or names
    stored = {name: Checkpoint(out / "purified" / name, architecture.prefix) for name in purified}
    source = StoredPurification(plain, stored)
(out / "merged").mkdir(parents=True)
context = MergeContext(str(folder / "base"), base, experts, architecture, {})
write_merged(out / "merged", method, source, method.default_scale, context)
print(json.dumps([cost.baseline_bytes, cost.peak_bytes, memory.highest_resident_bytes()]))
"""


@pytest.fixture(scope="module")
def mid_size(tmp_path_factory, tiny_tokenizer):
    """Base, four experts and statistics in the shapes of BERT-base, one layer deep."""
    import torch
    from safetensors.torch import save_file
    from transformers import BertConfig, BertForSequenceClassification

    from pave_lightning.statistics import LayerMoment, TaskStatistics

    folder = tmp_path_factory.mktemp("mid-size")
    config = BertConfig(num_hidden_layers=1, vocab_size=20_000)
    config.architectures = ["BertForSequenceClassification"]
    with torch.device("meta"):
        shapes = {n: p.shape for n, p in BertForSequenceClassification(config).named_parameters()}
    base = {name: torch.randn(shape) * 0.02 for name, shape in shapes.items()}
    for name in ["base", *(f"expert-{index}" for index in range(4))]:
        target = folder / name
        config.save_pretrained(target)
        tiny_tokenizer.save_pretrained(target)
        expert = {key: value + 0.002 * torch.randn(()) * value.roll(1) for key, value in base.items()}
        save_file(expert, target / "model.safetensors", metadata={"format": "pt"})
        for captured in ("smallest", "input"):
            moments = {}
            for key, weight in expert.items():
                if ".layer." in key and weight.ndim == 2:
                    spread = torch.linspace(1, 0.01, weight.shape[1])
                    narrow = weight.shape[1] > weight.shape[0] and captured == "smallest"
                    matrix = weight * spread if narrow else torch.diag(spread)
                    layer = key.removeprefix("bert.").removesuffix(".weight")
                    moments[layer] = LayerMoment("cross" if narrow else "input", matrix, 100)
            TaskStatistics(moments, examples=10).save(folder / f"statistics-{captured}-{name}.safetensors")
    return folder


@LINUX
@pytest.mark.slow
@pytest.mark.parametrize(
    ("method", "moments", "options"),
    [
        ("ties", "", {}),
        ("emr", "", {}),
        ("tsv_m embeddings", "", {}),
        ("iso_c embeddings", "", {}),
        ("iso_cts embeddings", "", {}),
        ("dc_merge embeddings", "", {}),
        ("task_arithmetic", "smallest", {}),
        ("task_arithmetic", "smallest", {"scope": "global"}),
        ("task_arithmetic", "smallest", {"exact": True}),
        ("task_arithmetic", "smallest", {"statistics": "task_vector"}),
        ("task_arithmetic", "smallest", {"statistics": "random"}),
        ("task_arithmetic", "input", {}),
        ("task_arithmetic", "input", {"metric": "root", "damping": 0.1}),
        ("task_arithmetic", "smallest", {"tasks": ["expert-1"]}),
    ],
)
def test_the_predicted_peak_is_the_measured_one(mid_size, method, moments, options):
    command = [sys.executable, "-c", MEASURE, str(mid_size), method, moments, json.dumps(options)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    baseline, predicted, measured = json.loads(done.stdout.splitlines()[-1])
    assert baseline < predicted
    assert predicted == pytest.approx(measured, rel=0.25)


def test_the_memory_of_a_merge_by_hand():
    large, small = linear("large", 100, 30), linear("small", 100, 10)
    methods = [make_method("task_arithmetic", {})]
    # Merged task vector and weight, and four tensors of rows for each of two tasks.
    alone = {parameter.name: 4 * (2 + 4 * 2) * parameter.elements for parameter in (large, small)}
    assert costs.merging_bytes([large], 2, methods) == alone[large.name]
    # The first one waits to be written while the second one is merged.
    assert costs.merging_bytes([small, large], 2, methods) == 4 * small.elements + alone[large.name]
    assert costs.merging_bytes([large, small], 2, methods) == max(
        alone[large.name], 4 * large.elements + alone[small.name]
    )
    three = [large, *[linear(f"small{index}", 100, 10) for index in range(30)]]
    assert costs.merging_bytes(three, 2, methods) == 4 * (3000 + 29 * 1000) + alone[small.name]


def test_what_rules_hold_and_keep_counts():
    def peak(name, parameters=PARAMETERS):
        return costs.merging_bytes(parameters, 4, [make_method(name, {})])

    model = 4 * sum(parameter.elements for parameter in PARAMETERS)
    assert peak("featcal") - peak("iso_c") >= 4 * model - 8 * max(p.elements for p in PARAMETERS) * 4
    assert peak("esm") - peak("iso_c") == model
    square = [Parameter("w", ParameterKind.LINEAR, (400, 400), 1)]
    # Each of four tasks keeps 100 directions of 400 + 400 numbers of 4 bytes.
    kept = costs.disk_bytes(square, 4, {}, methods=[make_method("tsv_c", {})], new_experts=0) - 4 * 400 * 400
    assert kept == 4 * 100 * 800 * 4


def test_tables_that_a_method_decomposes_are_seen_whole():
    table = Parameter("words.weight", ParameterKind.EMBEDDING, (50_000, 20))
    averaged, whole = (
        costs.merging_bytes([table], 3, [make_method("iso_c", {"embeddings": embeddings})])
        for embeddings in (False, True)
    )
    # Task vector and weight; and four tensors for each of three tasks, of a block of rows or of all rows.
    assert averaged == 4 * (2 * table.elements + 4 * 3 * costs.BLOCK_ELEMENTS)
    assert whole == 4 * (2 + 4 * 3) * table.elements
