import json
import sys

import pytest

from pave_lightning.errors import PaveError
from pave_lightning.weights import locate_model


@pytest.fixture
def package(tmp_path, monkeypatch):
    """A package that carries a model and must not be imported."""
    folder = tmp_path / "tiny_carrier"
    (folder / "models" / "small").mkdir(parents=True)
    (folder / "__init__.py").write_text("raise AssertionError('the package was imported')")
    (folder / "models" / "small" / "config.json").write_text(json.dumps({"model_type": "bert"}))
    monkeypatch.syspath_prepend(tmp_path)
    return folder


def test_a_folder(base_folder):
    assert locate_model(str(base_folder)) == base_folder


def test_a_folder_below_home(base_folder, monkeypatch):
    monkeypatch.setenv("HOME", str(base_folder.parent))
    assert locate_model(f"~/{base_folder.name}") == base_folder


def test_an_adapter_folder(tmp_path):
    (tmp_path / "adapter_config.json").write_text("{}")
    assert locate_model(str(tmp_path)) == tmp_path


def test_a_folder_without_configuration(tmp_path):
    with pytest.raises(PaveError, match=r"expert of 'rte': the folder .* has no config\.json"):
        locate_model(str(tmp_path), role="expert of 'rte'")


def test_a_file(base_folder):
    with pytest.raises(PaveError, match=r"model\.safetensors is a file; a model is named by its folder"):
        locate_model(str(base_folder / "model.safetensors"))


@pytest.mark.parametrize("reference", ["./nowhere", "/no/where", "~/nowhere-at-all", "some/deep/folder"])
def test_no_such_folder(reference):
    with pytest.raises(PaveError, match="base: there is no folder"):
        locate_model(reference, role="base")


def test_a_model_inside_a_package_is_found_without_importing_it(package):
    assert locate_model("package:tiny_carrier/models/small") == package / "models" / "small"
    assert "tiny_carrier" not in sys.modules


@pytest.mark.parametrize("reference", ["package:tiny_carrier/models/large", "package:tiny_carrier/models"])
def test_a_package_without_that_model(package, reference):
    with pytest.raises(PaveError, match=r"model: .*models"):
        locate_model(reference)


@pytest.mark.parametrize("name", ["not_installed_anywhere", "", "no.such.module", "."])
def test_a_package_that_is_not_installed(name):
    with pytest.raises(PaveError, match=f"the package '{name}' is not installed"):
        locate_model(f"package:{name}/small")


@pytest.mark.parametrize("reference", ["nobody/nothing", "nothing-by-that-name"])
def test_a_hub_id_without_network(reference, monkeypatch):
    import huggingface_hub

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(PaveError, match=f"base: '{reference}' is no folder here .* HF_HUB_OFFLINE"):
        locate_model(reference, role="base")


def test_neither_folder_nor_hub_id():
    with pytest.raises(PaveError, match="'two words/model' is neither a folder here nor a valid hub id"):
        locate_model("two words/model")
