import pytest

from pave_lightning.tasks.copies import kept_copy


@pytest.fixture
def make(tmp_path):
    calls = []

    def write(path):
        calls.append(path)
        path.write_bytes(b"content" * 100)

    write.calls = calls
    write.kept = lambda: kept_copy(tmp_path / "copies", "stem", write)
    return write


def test_a_copy_is_made_once(make):
    path = make.kept()
    assert make.kept() == path
    assert len(make.calls) == 1
    assert path.read_bytes() == b"content" * 100
    assert [file.name for file in path.parent.iterdir()] == [path.name]


@pytest.mark.parametrize("damage", [b"", b"content" * 99, b"CONTENT" * 100, b"content" * 101])
def test_a_damaged_copy_is_set_aside_told_and_made_anew(damage, make, caplog):
    path = make.kept()
    path.unlink()  # another file of that name, as the name of a file is all that is remembered
    path.write_bytes(damage)
    assert make.kept() == path
    assert path.read_bytes() == b"content" * 100
    assert path.with_name(path.name + ".damaged-1").read_bytes() == damage
    assert f"{path} is damaged; it is set aside as {path.name}.damaged-1 and made anew" in caplog.text
    assert make.kept() == path
    assert len(make.calls) == 2


def test_nothing_is_left_of_a_copy_that_fails(tmp_path):
    def fail(path):
        path.write_bytes(b"half")
        raise OSError("no space")

    with pytest.raises(OSError, match="no space"):
        kept_copy(tmp_path, "stem", fail)
    assert list(tmp_path.iterdir()) == []


def test_nothing_is_left_of_what_is_written_beside_a_copy(tmp_path):
    def stopped(path):
        (path.parent / "tmp123").write_text("half")
        path.write_text("half")
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        kept_copy(tmp_path / "copies", "stem", stopped)
    assert list((tmp_path / "copies").iterdir()) == []
