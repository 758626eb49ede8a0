import json
import re
from pathlib import Path

import pytest
import safetensors.torch
import torch
from safetensors import safe_open

from pave_lightning.errors import PaveError
from pave_lightning.statistics import LayerMoment, NormMoment, TaskStatistics
from pave_lightning.statistics.storage import HEADER_KEY
from pave_lightning.subspace import MomentKind


def make_statistics() -> TaskStatistics:
    shared = LayerMoment("input", torch.randn(4, 4), 30)
    cross = LayerMoment("cross", torch.randn(2, 8), 20, seen=50)
    moments = {"layer.1.query": shared, "layer.1.key": shared, "layer.1.down": cross}
    return TaskStatistics(moments, examples=7, metadata={"task": "movie", "note": 'quoted "words" ünd and more'})


def test_comes_back_as_it_was(tmp_path: Path) -> None:
    statistics = make_statistics()
    file = tmp_path / "new" / "movie.safetensors"
    statistics.save(file)
    loaded = TaskStatistics.load(str(file))
    assert loaded.layers() == list(loaded) == ["layer.1.down", "layer.1.key", "layer.1.query"]
    assert (loaded.examples, loaded.metadata, len(loaded)) == (7, statistics.metadata, 3)
    for name in loaded:
        assert torch.equal(loaded[name].matrix, statistics[name].matrix)
        assert (loaded[name].kind, loaded[name].rows) == (statistics[name].kind, statistics[name].rows)
        assert loaded[name].seen == loaded.seen(name) == statistics.seen(name)
        assert loaded.shape(name) == tuple(statistics[name].matrix.shape) == statistics.shape(name)
        assert (loaded.kind(name), loaded.rows(name)) == (statistics.kind(name), statistics.rows(name))
        assert loaded.owner(name) == statistics.owner(name)
    assert list(file.parent.iterdir()) == [file]
    assert (loaded.seen("layer.1.down"), loaded.seen("layer.1.key")) == (50, 30)


@pytest.mark.parametrize(
    ("kind", "shape"), [("input", (3, 3)), ("cross", (2, 3)), ("rows", (5, 3)), ("output", (2, 2))]
)
def test_all_kinds_are_kept(tmp_path: Path, kind: MomentKind, shape: tuple[int, int]) -> None:
    matrix = torch.randn(shape)
    TaskStatistics({"layer": LayerMoment(kind, matrix, 5)}, examples=5).save(tmp_path / "file")
    loaded = TaskStatistics.load(tmp_path / "file")
    assert (loaded.kind("layer"), loaded.shape("layer"), loaded.rows("layer")) == (kind, shape, 5)
    assert torch.equal(loaded["layer"].matrix, matrix)


def test_files_of_the_first_format_are_read(tmp_path: Path) -> None:
    layers = {"x": {"owner": "a", "kind": "input", "rows": 7}}
    header = {"format_version": 1, "examples": 1, "metadata": {}, "layers": layers}
    safetensors.torch.save_file({"a": torch.ones(2, 2)}, tmp_path / "f", metadata={HEADER_KEY: json.dumps(header)})
    loaded = TaskStatistics.load(tmp_path / "f")
    assert (loaded.rows("x"), loaded.seen("x")) == (7, 7)


def test_a_shared_matrix_is_stored_once(tmp_path: Path) -> None:
    statistics, file = make_statistics(), tmp_path / "movie.safetensors"
    statistics.save(file)
    with safe_open(file, framework="pt") as opened:
        assert sorted(opened.keys()) == ["layer.1.down", "layer.1.key"]
    assert statistics["layer.1.query"].matrix is statistics["layer.1.key"].matrix
    assert TaskStatistics.load(file).owner("layer.1.query") == "layer.1.key"


def test_equal_statistics_give_equal_bytes(tmp_path: Path) -> None:
    statistics = make_statistics()
    backwards = TaskStatistics(
        dict(reversed(list(statistics.items()))), examples=7, metadata=dict(reversed(statistics.metadata.items()))
    )
    for name, given in [("a", statistics), ("b", backwards)]:
        given.save(tmp_path / name)
    TaskStatistics.load(tmp_path / "a").save(tmp_path / "c")
    assert len({(tmp_path / name).read_bytes() for name in "abc"}) == 1


def test_loading_reads_headers_only(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "movie.safetensors"
    make_statistics().save(file)
    read: list[str] = []
    reader = "pave_lightning.statistics.storage._read_matrix"
    monkeypatch.setattr(reader, lambda path, owner: (read.append(owner), torch.zeros(4, 4))[1])
    loaded = TaskStatistics.load(file)
    assert "layer.1.query" in loaded
    assert "layer.1.value" not in loaded
    assert (loaded.shape("layer.1.query"), loaded.rows("layer.1.down")) == ((4, 4), 20)
    assert "layers=3" in repr(loaded)
    assert read == []
    assert loaded["layer.1.query"].rows == 30
    assert read == ["layer.1.key"]


def test_a_failed_write_leaves_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "movie.safetensors"
    make_statistics().save(file)
    before = file.read_bytes()

    def fail(*_: object, **__: object) -> None:
        raise OSError("disk full")

    monkeypatch.setattr("os.fsync", fail)
    with pytest.raises(OSError, match="disk full"):
        make_statistics().save(file)
    assert file.read_bytes() == before
    assert list(tmp_path.iterdir()) == [file]


def test_refuses_a_missing_file(tmp_path: Path) -> None:
    with pytest.raises(PaveError, match=r"no statistics at .*nowhere"):
        TaskStatistics.load(tmp_path / "nowhere")
    with pytest.raises(PaveError, match="no statistics at"):
        TaskStatistics.load(tmp_path)


@pytest.mark.parametrize("size", [0, 4, 100, -1])
def test_refuses_a_truncated_file(tmp_path: Path, size: int) -> None:
    file = tmp_path / "movie.safetensors"
    make_statistics().save(file)
    file.write_bytes(file.read_bytes()[:size])
    with pytest.raises(PaveError, match="truncated or no safetensors"):
        TaskStatistics.load(file)


def test_refuses_the_files_of_others(tmp_path: Path) -> None:
    file = tmp_path / "model.safetensors"
    file.write_text("not safetensors at all, but long enough to look like a header")
    with pytest.raises(PaveError, match="truncated or no safetensors"):
        TaskStatistics.load(file)
    safetensors.torch.save_file({"weight": torch.ones(2)}, file)
    with pytest.raises(PaveError, match="holds no statistics of a task"):
        TaskStatistics.load(file)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"format_version": 99}, "format 99"),
        ({"examples": "many"}, "damaged"),
        ({"layers": {"x": {"owner": "gone", "kind": "input", "rows": 1}}}, "damaged"),
        ({"layers": {"x": {"owner": "a", "kind": "other", "rows": 1}}}, "damaged"),
        ({"layers": {"x": {"owner": "a", "kind": "rows", "rows": 3}}}, "damaged"),
        ({"layers": {"x": {"owner": "b", "kind": "input", "rows": 1}}}, "damaged"),
        ({"layers": {"x": {"owner": "a", "kind": "input", "rows": 0}}}, "damaged"),
        ({"layers": {"x": {"owner": "a", "kind": "input", "rows": 2, "seen": 1}}}, "damaged"),
        ({"layers": 3}, "damaged"),
    ],
)
def test_refuses_a_damaged_header(tmp_path: Path, change: dict[str, object], message: str) -> None:
    header = {"format_version": 1, "examples": 1, "metadata": {}, "layers": {}} | change
    file = tmp_path / "movie.safetensors"
    tensors = {"a": torch.ones(2, 2), "b": torch.ones(2, 3)}
    safetensors.torch.save_file(tensors, file, metadata={HEADER_KEY: json.dumps(header)})
    with pytest.raises(PaveError, match=message):
        TaskStatistics.load(file)


@pytest.mark.parametrize("broken", [float("nan"), float("inf")])
def test_names_a_layer_that_is_not_finite(tmp_path: Path, broken: float) -> None:
    moments = {
        "good": LayerMoment("input", torch.ones(2, 2), 1),
        "bad": LayerMoment("input", torch.full((2, 2), broken), 1),
    }
    TaskStatistics(moments, examples=1).save(tmp_path / "file")
    loaded = TaskStatistics.load(tmp_path / "file")
    assert loaded["good"].rows == 1
    with pytest.raises(PaveError, match=r"layer 'bad' .* NaN or infinite"):
        loaded["bad"]


def test_refuses_moments_that_are_none() -> None:
    for moment in (
        LayerMoment("input", torch.ones(2, 3), 1),
        LayerMoment("cross", torch.ones(2), 1),
        LayerMoment("cross", torch.ones(2, 3, dtype=torch.float64), 1),
        LayerMoment("output", torch.ones(2, 3), 1),
        LayerMoment("rows", torch.ones(2, 3), 3),
        LayerMoment("input", torch.ones(2, 2), 3, seen=2),
        LayerMoment("other", torch.ones(2, 2), 3),  # type: ignore[arg-type]
    ):
        with pytest.raises(PaveError, match="layer 'a'"):
            TaskStatistics({"a": moment}, examples=1)
    matrix = torch.ones(2, 2)
    unlike = {"a": LayerMoment("input", matrix, 1), "b": LayerMoment("input", matrix, 2)}
    with pytest.raises(PaveError, match="share a matrix"):
        TaskStatistics(unlike, examples=1)


def test_an_unknown_layer_is_a_key_error() -> None:
    statistics = make_statistics()
    with pytest.raises(KeyError, match=r"did you mean 'layer\.1\.query'"):
        statistics["layer.1.quary"]
    assert statistics.get("layer.1.quary") is None


def with_norms() -> TaskStatistics:
    moments = {"layer.query": LayerMoment("input", torch.eye(2), 3)}
    norms = {
        "layer.output_norm": NormMoment(torch.tensor([0.5, 2.0]), 3, seen=9),
        "layer.input_norm": NormMoment(torch.tensor([1.0, 4.0]), 4),
    }
    return TaskStatistics(moments, examples=2, norms=norms)


def test_norms_come_back_as_they_were(tmp_path: Path) -> None:
    statistics = with_norms()
    statistics.save(tmp_path / "a")
    loaded = TaskStatistics.load(tmp_path / "a")
    assert list(loaded) == loaded.layers() == ["layer.query"]
    for one in (statistics, loaded):
        assert list(one.norms) == ["layer.input_norm", "layer.output_norm"]
        assert len(one.norms) == 2
        assert "layer.query" not in one.norms
        found = one.norms["layer.output_norm"]
        assert (found.squares.tolist(), found.rows, found.seen) == ([0.5, 2.0], 3, 9)
    assert loaded.norms["layer.input_norm"].seen == 4
    with pytest.raises(KeyError):
        loaded.norms["layer.query"]
    loaded.save(tmp_path / "b")
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()


def test_files_without_norms_say_nothing_of_them(tmp_path: Path) -> None:
    moments = {"a": LayerMoment("input", torch.eye(2), 3)}
    for name, norms in (("plain", None), ("empty", dict[str, NormMoment]())):
        TaskStatistics(moments, examples=1, norms=norms).save(tmp_path / name)
    assert (tmp_path / "plain").read_bytes() == (tmp_path / "empty").read_bytes()
    assert b"norm" not in (tmp_path / "plain").read_bytes()
    assert dict(TaskStatistics.load(tmp_path / "plain").norms) == {}


def test_norms_that_share_one_tensor_are_kept(tmp_path: Path) -> None:
    both = torch.arange(4.0)
    norms = {"a": NormMoment(both[:2], 1), "b": NormMoment(both[:2], 1), "c": NormMoment(both[2:], 1)}
    TaskStatistics({}, examples=1, norms=norms).save(tmp_path / "f")
    assert [norm.squares.tolist() for norm in TaskStatistics.load(tmp_path / "f").norms.values()] == [
        [0.0, 1.0],
        [0.0, 1.0],
        [2.0, 3.0],
    ]


def test_a_norm_may_bear_the_name_of_a_layer(tmp_path: Path) -> None:
    moments = {"a": LayerMoment("input", torch.eye(2), 3)}
    TaskStatistics(moments, examples=1, norms={"a": NormMoment(torch.ones(2), 3)}).save(tmp_path / "f")
    loaded = TaskStatistics.load(tmp_path / "f")
    assert loaded["a"].matrix.shape == (2, 2)
    assert loaded.norms["a"].squares.shape == (2,)


def test_refuses_norms_that_are_none() -> None:
    for norm, message in (
        (
            NormMoment(torch.ones(2, 2), 1),
            r"norm 'n': expected a float32 vector, found torch\.float32 of shape \(2, 2\)",
        ),
        (NormMoment(torch.ones(2, dtype=torch.float64), 1), r"found torch\.float64 of shape \(2,\)"),
        (NormMoment(torch.ones(2), 0), "norm 'n': expected at least one row"),
        (NormMoment(torch.ones(2), 3, seen=2), "no more than were seen, found 3 of 2"),
    ):
        with pytest.raises(PaveError, match=message):
            TaskStatistics({}, examples=1, norms={"n": norm})


@pytest.mark.parametrize(
    "norms",
    [
        {"gone": {"rows": 1, "seen": 1}},
        {"flat": {"rows": 0, "seen": 1}},
        {"flat": {"rows": 2, "seen": 1}},
        {"flat": {"rows": 1}},
        {"square": {"rows": 1, "seen": 1}},
        3,
    ],
)
def test_refuses_a_damaged_header_of_norms(tmp_path: Path, norms: object) -> None:
    header = {"format_version": 2, "examples": 1, "metadata": {}, "layers": {}, "norms": norms}
    tensors = {"norm:flat": torch.ones(2), "norm:square": torch.ones(2, 2)}
    safetensors.torch.save_file(tensors, tmp_path / "f", metadata={HEADER_KEY: json.dumps(header)})
    with pytest.raises(PaveError, match="damaged"):
        TaskStatistics.load(tmp_path / "f")


def test_names_a_norm_that_is_not_finite(tmp_path: Path) -> None:
    TaskStatistics({}, examples=1, norms={"n": NormMoment(torch.tensor([float("nan")]), 1)}).save(tmp_path / "f")
    with pytest.raises(PaveError, match=r"norm:n.* NaN or infinite"):
        TaskStatistics.load(tmp_path / "f").norms["n"]


def test_keeps_which_layers_no_example_reached(tmp_path: Path) -> None:
    moments = {"a": LayerMoment("input", torch.eye(2), 3)}
    for unreached, expected in ((["z", "y"], ("y", "z")), ([], ()), (None, None)):
        TaskStatistics(moments, examples=1, unreached=unreached).save(tmp_path / "f")
        loaded = TaskStatistics.load(tmp_path / "f")
        assert loaded.unreached == expected
        loaded.save(tmp_path / "again")
        assert (tmp_path / "again").read_bytes() == (tmp_path / "f").read_bytes()


@pytest.mark.parametrize("unreached", ["layer", [1]])
def test_refuses_a_damaged_list_of_layers_that_were_not_reached(tmp_path: Path, unreached: object) -> None:
    header = {"format_version": 2, "examples": 1, "metadata": {}, "layers": {}, "unreached": unreached}
    safetensors.torch.save_file({"a": torch.ones(2, 2)}, tmp_path / "f", metadata={HEADER_KEY: json.dumps(header)})
    with pytest.raises(PaveError, match="damaged"):
        TaskStatistics.load(tmp_path / "f")


def test_refuses_what_was_captured_of_something_else(tmp_path: Path) -> None:
    file = tmp_path / "f"
    moments = {"a": LayerMoment("input", torch.eye(2), 3)}
    TaskStatistics(moments, examples=1, metadata={"expert": "one"}).save(file)
    assert TaskStatistics.load(file, of={"expert": "one", "unknown": "to the file"}).examples == 1
    with pytest.raises(PaveError) as caught:
        TaskStatistics.load(file, of={"expert": "two"})
    assert str(caught.value) == (
        f"{file} was captured of another expert: expected expert two, found one: "
        f"delete {file}, then capture the statistics again (pave capture RECIPE)"
    )


def test_damage_is_told_with_the_file_to_delete(tmp_path: Path) -> None:
    file = tmp_path / "f"
    remedy = re.escape(f"delete {file}, then capture the statistics again (pave capture RECIPE)")
    matrix = torch.eye(2)
    matrix[0, 1] = torch.nan
    TaskStatistics({"a": LayerMoment("input", matrix, 3)}, examples=1).save(file)
    loaded = TaskStatistics.load(file)
    for _ in range(2):  # a matrix that was refused does not count as looked through
        with pytest.raises(PaveError, match=f"holds NaN or infinite values: {remedy}"):
            loaded["a"]
    file.write_bytes(file.read_bytes()[:-4])
    with pytest.raises(PaveError, match=f"truncated or no safetensors file .*: {remedy}"):
        TaskStatistics.load(file)
    with pytest.raises(PaveError, match=f"cannot read layer 'a' from .*: {remedy}"):
        loaded["a"]
    for header in ({"format_version": 2}, {"format_version": 2, "examples": "1", "metadata": {}, "layers": {}}):
        safetensors.torch.save_file({"a": matrix}, file, metadata={HEADER_KEY: json.dumps(header)})
        with pytest.raises(PaveError, match=f"damaged statistics header.*: {remedy}"):
            TaskStatistics.load(file)


def test_a_shared_matrix_is_looked_through_for_nan_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shared = LayerMoment("input", torch.eye(2), 3)
    TaskStatistics({"a": shared, "b": shared, "c": LayerMoment("input", torch.eye(2), 3)}, examples=1).save(
        tmp_path / "f"
    )
    loaded = TaskStatistics.load(tmp_path / "f")
    looked: list[int] = []
    real = torch.aminmax

    def counted(matrix: torch.Tensor) -> object:
        looked.append(1)
        return real(matrix)

    monkeypatch.setattr("pave_lightning.statistics.storage.torch.aminmax", counted)
    for layer in ("a", "b", "c", "a"):
        assert torch.equal(loaded[layer].matrix, torch.eye(2))
    assert len(looked) == 2
