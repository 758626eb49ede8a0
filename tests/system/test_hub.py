"""The hub where it cannot be reached."""

import time

import pytest

from pave_lightning.errors import PaveError
from pave_lightning.system import hub
from pave_lightning.weights import locate_model


@pytest.fixture
def no_network(monkeypatch):
    """A hub of which nothing comes back, and whose host takes for ever to look up."""
    from huggingface_hub import constants

    asked = []

    class Session:
        def head(self, address, **options):
            asked.append(address)
            time.sleep(30)

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr("huggingface_hub.get_session", Session)
    monkeypatch.setattr(hub, "PATIENCE_SECONDS", 0.2)
    hub.hub_answers.cache_clear()
    yield asked
    hub.hub_answers.cache_clear()


def test_a_hub_that_does_not_answer_is_asked_once(no_network):
    from huggingface_hub import constants

    start = time.monotonic()
    for _ in range(3):
        with pytest.raises(PaveError, match=r"base: 'nobody/nothing' is no folder here .* does not answer"):
            locate_model("nobody/nothing", role="base")
    assert time.monotonic() - start < 5
    assert len(no_network) == 1
    assert constants.HF_HUB_OFFLINE is False


def test_datasets_ask_no_more_either(no_network):
    import datasets

    from pave_lightning.tasks.data import _read_hub
    from pave_lightning.tasks.task import Task

    task = Task.model_validate({"name": "t", "data": {"hub": "nobody/nothing"}, "text": "text", "classes": 2})
    before = datasets.config.HF_HUB_OFFLINE
    start = time.monotonic()
    with pytest.raises(PaveError, match="does not answer; is there a network"):
        _read_hub(task, "train")
    assert time.monotonic() - start < 10
    assert before == datasets.config.HF_HUB_OFFLINE


def test_a_path_that_looks_local_is_told_at_once(tmp_path, monkeypatch, no_network):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "models" / "bert-tiny").mkdir(parents=True)
    with pytest.raises(PaveError, match=r"there is no folder models/bert-tinny; did you mean models/bert-tiny\? "):
        locate_model("models/bert-tinny", role="base")
    with pytest.raises(PaveError, match=r"there is no folder models/zzz \(models is a folder here, so it was"):
        locate_model("models/zzz", role="base")
    with pytest.raises(PaveError, match=r"there is no folder .*models/bert-tinny; did you mean .*models/bert-tiny\?"):
        locate_model(str(tmp_path / "models" / "bert-tinny"), role="base")
    assert no_network == []


@pytest.mark.parametrize("reference", ["", " ", "a\0b", "a\x1b[31m"])
def test_what_can_name_no_model(reference):
    with pytest.raises(PaveError, match="names no model; expected a folder or a hub id"):
        locate_model(reference, role="base")
