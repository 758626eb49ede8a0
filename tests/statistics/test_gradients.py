import json
from pathlib import Path

import pytest
import safetensors.torch
import torch
from safetensors import safe_open

from pave_lightning.errors import PaveError
from pave_lightning.statistics import gradients
from pave_lightning.statistics.gradients import HEADER_KEY, TaskGradients


def make_gradients() -> TaskGradients:
    random = torch.Generator().manual_seed(0)
    shapes = {"layer.weight": (7, 3), "layer.bias": (7,), "kernel": (4, 2, 2), "temperature": (), "none": (0, 3)}
    values = {name: torch.rand(shape, generator=random) for name, shape in shapes.items()}
    return TaskGradients("fisher", values, examples=12, metadata={"task": "movie", "note": 'quoted "words" ünd'})


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "new" / "movie.safetensors"
    make_gradients().save(path)
    return path


def test_comes_back_as_it_was(file: Path) -> None:
    given, loaded = make_gradients(), TaskGradients.load(str(file))
    assert list(loaded) == ["kernel", "layer.bias", "layer.weight", "none", "temperature"] == list(given)
    assert (loaded.kind, loaded.examples, loaded.metadata, len(loaded)) == ("fisher", 12, given.metadata, 5)
    for name in loaded:
        assert torch.equal(loaded[name], given[name])
        assert loaded[name].dtype == torch.float32
        assert loaded.shape(name) == given.shape(name) == tuple(given[name].shape)
    assert list(file.parent.iterdir()) == [file]


@pytest.mark.parametrize("rows", [slice(0, 2), slice(3, 4), slice(2, 99), slice(4, 4), slice(None)])
def test_rows_are_those_of_the_whole(file: Path, rows: slice) -> None:
    given, loaded = make_gradients(), TaskGradients.load(file)
    for name in ("layer.weight", "layer.bias", "kernel"):
        assert torch.equal(loaded.read(name, rows), given[name][rows])
        assert torch.equal(given.read(name, rows), given[name][rows])


def test_rows_are_read_without_the_rest(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    class Watched:
        def __init__(self, *given: object, **named: object) -> None:
            self.opened = safe_open(*given, **named)  # type: ignore[arg-type]

        def __enter__(self) -> "Watched":
            return self

        def __exit__(self, *given: object) -> None:
            asked.append("closed")

        def get_slice(self, name: str) -> object:
            asked.append(name)
            return self.opened.get_slice(name)

    loaded = TaskGradients.load(file)
    monkeypatch.setattr(gradients, "safe_open", Watched)
    assert loaded.read("layer.weight", slice(1, 3)).shape == (2, 3)
    assert asked == ["layer.weight", "closed"]


def test_loading_reads_headers_only(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*given: object) -> None:
        raise AssertionError("read")

    monkeypatch.setattr(gradients, "_check", refuse)
    loaded = TaskGradients.load(file)
    assert "layer.bias" in loaded
    assert "layer.other" not in loaded
    assert "parameters=5" in repr(loaded)
    assert list(loaded.misfits({"kernel": (4, 2, 2), "temperature": ()})) == []
    with pytest.raises(AssertionError, match="read"):
        loaded["layer.bias"]


def test_equal_content_gives_equal_bytes(tmp_path: Path) -> None:
    first = make_gradients()
    backwards = TaskGradients(
        "fisher",
        dict(reversed(list(first.items()))),
        examples=12,
        metadata=dict(reversed(first.metadata.items())),
    )
    first.save(tmp_path / "a")
    backwards.save(tmp_path / "b")
    TaskGradients.load(tmp_path / "a").save(tmp_path / "c")
    assert len({(tmp_path / name).read_bytes() for name in "abc"}) == 1


def test_a_failed_write_leaves_the_old_file(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = file.read_bytes()

    def fail(*_: object, **__: object) -> None:
        raise OSError("disk full")

    monkeypatch.setattr("os.fsync", fail)
    with pytest.raises(OSError, match="disk full"):
        make_gradients().save(file)
    assert file.read_bytes() == before
    assert list(file.parent.iterdir()) == [file]


def test_refuses_a_missing_file(tmp_path: Path) -> None:
    for missing in (tmp_path / "nowhere", tmp_path):
        with pytest.raises(PaveError, match="no gradients at"):
            TaskGradients.load(missing)


@pytest.mark.parametrize("size", [0, 4, 100, -1])
def test_refuses_a_truncated_file(file: Path, size: int) -> None:
    file.write_bytes(file.read_bytes()[:size])
    with pytest.raises(PaveError, match="truncated or no safetensors"):
        TaskGradients.load(file)


def test_tells_when_the_file_is_gone(file: Path) -> None:
    loaded = TaskGradients.load(file)
    file.unlink()
    for rows in (None, slice(0, 1)):
        with pytest.raises(
            PaveError, match=r"cannot read the gradients of 'layer.bias' from .*take the gradients again"
        ):
            loaded.read("layer.bias", rows)


def test_refuses_the_files_of_others(tmp_path: Path) -> None:
    file = tmp_path / "model.safetensors"
    safetensors.torch.save_file({"weight": torch.ones(2)}, file)
    with pytest.raises(PaveError, match="holds no gradients of a task"):
        TaskGradients.load(file)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"format_version": 99}, "format 99, known is up to 1"),
        ({"format_version": "new"}, "damaged"),
        ({"examples": "many"}, "damaged"),
        ({"examples": 0}, "damaged"),
        ({"kind": "other"}, "damaged"),
        ({"kind": ["fisher"]}, "damaged"),
        ({"metadata": 3}, "damaged"),
    ],
)
def test_refuses_a_damaged_header(tmp_path: Path, change: dict[str, object], message: str) -> None:
    header = {"format_version": 1, "kind": "fisher", "examples": 1, "metadata": {}} | change
    file = tmp_path / "movie.safetensors"
    safetensors.torch.save_file({"a": torch.ones(2)}, file, metadata={HEADER_KEY: json.dumps(header)})
    with pytest.raises(PaveError, match=message):
        TaskGradients.load(file)


@pytest.mark.parametrize("text", ["[]", "no json", "{}"])
def test_refuses_a_header_that_is_none(tmp_path: Path, text: str) -> None:
    file = tmp_path / "movie.safetensors"
    safetensors.torch.save_file({"a": torch.ones(2)}, file, metadata={HEADER_KEY: text})
    with pytest.raises(PaveError, match="damaged gradients header"):
        TaskGradients.load(file)


def stored(path: Path, value: torch.Tensor) -> Path:
    header = {"format_version": 1, "kind": "absolute", "examples": 1, "metadata": {}}
    safetensors.torch.save_file({"good": torch.ones(2), "bad": value}, path, metadata={HEADER_KEY: json.dumps(header)})
    return path


def test_refuses_other_dtypes(tmp_path: Path) -> None:
    with pytest.raises(PaveError, match="damaged gradients header"):
        TaskGradients.load(stored(tmp_path / "file", torch.ones(2).half()))
    with pytest.raises(PaveError, match=r"the gradients of 'a': expected float32, found torch.float64"):
        TaskGradients("fisher", {"a": torch.ones(2).double()}, examples=1)


@pytest.mark.parametrize(
    ("broken", "message"), [(float("nan"), "NaN or infinite"), (float("inf"), "NaN or infinite"), (-1.0, "negative")]
)
def test_names_a_parameter_that_is_broken(tmp_path: Path, broken: float, message: str) -> None:
    value = torch.tensor([1.0, 0.0, broken])
    loaded = TaskGradients.load(stored(tmp_path / "file", value))
    assert loaded["good"].tolist() == [1.0, 1.0]
    assert loaded.read("bad", slice(0, 2)).tolist() == [1.0, 0.0]
    for rows in (None, slice(2, 3)):
        with pytest.raises(PaveError, match=f"the gradients of 'bad' in .* hold {message} values"):
            loaded.read("bad", rows)
    with pytest.raises(PaveError, match=f"the gradients of 'bad' hold {message} values"):
        TaskGradients("absolute", {"bad": value}, examples=1)


def test_refuses_what_is_no_mean() -> None:
    with pytest.raises(PaveError, match="kind fisher or absolute, found 'other'"):
        TaskGradients("other", {}, examples=1)  # type: ignore[arg-type]
    with pytest.raises(PaveError, match="at least one example, found 0"):
        TaskGradients("fisher", {}, examples=0)


def test_an_unknown_parameter_is_a_key_error() -> None:
    for ask in (make_gradients().read, make_gradients().shape):
        with pytest.raises(KeyError, match=r"did you mean 'layer\.weight'"):
            ask("layer.wieght")
    assert make_gradients().get("layer.wieght") is None


def test_misfits_are_told_by_name_and_shape() -> None:
    shapes = {"layer.weight": (3, 7), "temperature": (), "more": (2,), "yet.more": (1,)}
    assert list(make_gradients().misfits(shapes)) == [
        "there are none of 2 of 4 parameters, such as more",
        "those of layer.weight are [7, 3], expected [3, 7]",
    ]
