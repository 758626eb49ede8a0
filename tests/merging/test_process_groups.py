"""Merged folders that several processes write: what one process writes, in files of their own."""

import json
import os
import subprocess
import sys
from dataclasses import replace

import pytest
import torch
from transformers import AutoModel

from pave_lightning.errors import PaveError
from pave_lightning.merging import Evidence, MergedVectors, SequentialMethod, make_method, merge
from pave_lightning.merging.dealing import own_parameters
from pave_lightning.merging.folders import write_merged
from pave_lightning.merging.sharing import gathered
from pave_lightning.statistics.gradients import TaskGradients
from pave_lightning.system.process_groups import Place, dealt

METHODS = ("average", "ties", "tsv_m", "emr", "tall_masks", "tsv_c", "opcm", "perturb_and_merge", "iso_c", "dare")


@pytest.fixture
def evidence_of():
    def build(source):
        generator = torch.Generator().manual_seed(3)

        def drawn():
            values = {p.name: torch.rand(p.shape, generator=generator) for p in source.parameters}
            return TaskGradients("fisher", values, examples=1)

        return replace(Evidence(), fisher={task: drawn() for task in source.tasks})

    return build


@pytest.mark.parametrize("name", METHODS)
def test_two_processes_write_what_one_writes(
    name, in_processes, tmp_path, context_of, base_folder, expert_folders, evidence_of, assert_same_weights
):
    def write(group, folder):
        torch.set_num_threads(1)
        source, context = context_of(base_folder, expert_folders)
        method = make_method(name, {})
        folder.mkdir(exist_ok=True)
        scale = method.default_scale
        write_merged(
            folder,
            method,
            source,
            scale,
            context,
            evidence=evidence_of(source),
            max_shard_size=20_000,
            group=group,
        )
        return method.state(scale) if isinstance(method, SequentialMethod) else None

    one, two = tmp_path / "one", tmp_path / "two"
    states = [*in_processes(1, lambda group: write(group, one)), *in_processes(2, lambda group: write(group, two))]
    assert states[0] == states[1] == states[2]
    assert_same_weights(one, two)
    assert json.loads((one / "pave.json").read_text()) == json.loads((two / "pave.json").read_text())
    for task in expert_folders:
        kept = [folder / "modulators" / f"{task}.safetensors" for folder in (one, two)]
        assert kept[0].exists() == kept[1].exists()
        assert not kept[0].exists() or kept[0].read_bytes() == kept[1].read_bytes()
    assert not list(two.rglob("*.tmp"))
    index = json.loads((two / "model.safetensors.index.json").read_text())
    assert set(index["weight_map"].values()) == {file.name for file in two.glob("*.safetensors")}
    expected = dict(AutoModel.from_pretrained(one).named_parameters())
    for parameter, value in AutoModel.from_pretrained(two).named_parameters():
        assert parameter.startswith("pooler") or torch.equal(value, expected[parameter])


def test_a_known_result_is_written_in_parts(
    in_processes, tmp_path, context_of, base_folder, expert_folders, assert_same_weights
):
    source, context = context_of(base_folder, expert_folders)
    method = make_method("average", {})
    known = merge(method, source).vectors
    one, two = tmp_path / "one", tmp_path / "two"

    def write(group, folder):
        folder.mkdir(exist_ok=True)
        write_merged(folder, method, source, 0.5, context, merged=known, group=group)

    in_processes(1, lambda group: write(group, one))
    in_processes(2, lambda group: write(group, two))
    assert_same_weights(one, two)


def test_all_can_be_more_than_the_parameters(in_processes, make_source):
    vectors = {"one": {"a": torch.ones(3).numpy()}, "two": {"a": torch.zeros(3).numpy()}}
    found = in_processes(3, lambda group: merge("ties", make_source(vectors), group=group))
    assert all(list(one.vectors) == ["a"] for one in found)
    assert all(torch.equal(one.vectors["a"], found[0].vectors["a"]) for one in found)


def test_results_may_share_memory(in_processes, tmp_path):
    whole = torch.arange(6.0)

    def share(group):
        mask = torch.ones(3, dtype=torch.bool)
        own = MergedVectors({"a": whole[:3], "b": whole[3:]} if group.is_first else {"c": whole}, source=None)
        own.masks = {"x": {"a": mask}, "y": {"a": mask}} if group.is_first else {"x": {}, "y": {}}
        own.factors = {"x": {}, "y": {}}
        gathered(own, group)
        return own

    for found in in_processes(2, share):
        assert {name: vector.tolist() for name, vector in found.vectors.items()} == {
            "a": [0, 1, 2],
            "b": [3, 4, 5],
            "c": [0, 1, 2, 3, 4, 5],
        }
        assert found.masks["y"]["a"].all()


def test_the_largest_parameters_go_to_different_processes(in_processes, make_source):
    shapes = {"table": (50, 4), "a": (10, 10), "b": (10, 10), "bias": (4,)}
    vectors = {task: {name: torch.zeros(shape).numpy() for name, shape in shapes.items()} for task in ("x", "y")}
    shares = in_processes(
        2, lambda group: [p.name for p in own_parameters(make_method("average", {}), make_source(vectors), group)]
    )
    assert sorted(name for share in shares for name in share) == sorted(shapes)
    assert [{"table"} <= set(share) for share in shares] == [True, False]
    assert {"a", "b"} <= set(shares[1])


def test_shares_are_in_order_and_some_may_be_empty():
    assert dealt([3.0, 1.0], 3, float) == [[3.0], [1.0], []]
    assert dealt([1, 2, 3, 4], 1, float) == [[1, 2, 3, 4]]


def test_what_cannot_be_divided_is_refused(in_processes, make_source):
    method = make_method("average", {})
    type(method).parallel, type(method).serial_because = False, "it is for the test"
    vectors = {task: {"a": torch.zeros(3).numpy()} for task in ("x", "y")}
    try:
        with pytest.raises(PaveError, match="divided among 2 processes: it is for the test"):
            in_processes(2, lambda group: merge(method, make_source(vectors), group=group))
    finally:
        del type(method).parallel, type(method).serial_because


PROCESS = """
import torch
from pave_lightning.merging import make_method, merge
from pave_lightning.system.process_groups import process_group
from pave_lightning.weights import Parameter, ParameterKind, TaskVectors

class Drawn(TaskVectors):
    tasks = ("one", "two")
    parameters = tuple(Parameter(f"w{index}", ParameterKind.LINEAR, (index + 3, 4)) for index in range(5))

    def base(self, parameter, rows=None):
        return torch.zeros(parameter.shape)[rows or slice(None)]

    def expert(self, task, parameter, rows=None):
        generator = torch.Generator().manual_seed(len(task + parameter.name) + parameter.elements + (task == "two"))
        return torch.randn(parameter.shape, generator=generator)[rows or slice(None)]

torch.set_num_threads(1)
group = process_group()
for name in ("task_arithmetic", "ties", "emr", "opcm", "knots", "tsv_m"):
    one, all_of_us = merge(make_method(name, {}), Drawn()), merge(make_method(name, {}), Drawn(), group=group)
    assert list(sorted(one.vectors)) == list(sorted(all_of_us.vectors))
    assert all(torch.equal(one.vectors[key], all_of_us.vectors[key]) for key in one.vectors), name
    assert one.rescalers == all_of_us.rescalers and one.masks.keys() == all_of_us.masks.keys()
    assert all(torch.equal(one.masks[t][key], all_of_us.masks[t][key]) for t in one.masks for key in one.masks[t])
print(group.rank, group.size)
"""


def test_processes_of_their_own_do_the_same(tmp_path):
    commands = [
        subprocess.Popen(
            [sys.executable, "-c", PROCESS],
            env={**os.environ, **Place(rank, 2, tmp_path).environment()},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for rank in range(2)
    ]
    told = [command.communicate(timeout=250)[0] for command in commands]
    assert told == ["0 2\n", "1 2\n"]
    assert not list(tmp_path.glob("merged*")), "what they exchange is not left behind"
