"""Models that claim to be more than they are cost little more to refuse than a good one costs to check."""

import json
import shutil
import struct

import pytest


def rewrite(name, **values):
    def attack(folder):
        file = folder / name
        file.write_text(json.dumps({**json.loads(file.read_text()), **values}))

    return attack


def header(length, text=b""):
    def attack(folder):
        (folder / "model.safetensors").write_bytes(struct.pack("<Q", length) + text)

    return attack


def claimed(shape):
    text = json.dumps({"embeddings.word_embeddings.weight": {"dtype": "F32", "shape": shape, "data_offsets": [0, 4]}})
    return header(len(text), text.encode())


def many_shards(folder):
    (folder / "model.safetensors").unlink()
    names = {f"layer.{number}.weight": f"model-{number}.safetensors" for number in range(100_000)}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": names}))


def nested(folder):
    (folder / "config.json").write_text('{"a": ' * 100_000)


def grown(name, size):
    def attack(folder):
        with (folder / name).open("ab") as stream:
            stream.write(b" " * size)

    return attack


ATTACKS = {
    "ten million layers": rewrite("config.json", num_hidden_layers=10_000_000),
    "as many layers as are let through": rewrite("config.json", num_hidden_layers=500),
    "a hidden size of a billion": rewrite("config.json", hidden_size=1_000_000_008, num_attention_heads=8),
    "a million numbers": rewrite("config.json", pruned=list(range(1_000_000))),
    "a million classes": rewrite("config.json", id2label={str(number): "x" for number in range(1_000_000)}),
    "deep nesting": nested,
    "a long config": grown("config.json", 200_000_000),
    "a long tokenizer": grown("tokenizer.json", 200_000_000),
    "a header of a terabyte": header(1 << 40),
    "a header that is nothing": header(8, b"notajson"),
    "a table of a terabyte": claimed([1 << 30, 256]),
    "a hundred thousand shards": many_shards,
}


@pytest.fixture(scope="module")
def good(measured):
    """What a command costs on a good model: peak in MiB, seconds of the processor."""
    cost = {}

    def ask(folder):
        if not cost:
            code, _, *cost["plan"] = measured(folder, "plan", "recipe.json")
            assert code == 0
        return cost["plan"]

    return ask


@pytest.mark.slow
@pytest.mark.parametrize("attack", ATTACKS)
def test_attacks_cost_little_more_than_a_good_model(attack, recipe_settings, base_folder, measured, good, tmp_path):
    base = tmp_path / "base"
    shutil.copytree(base_folder, base)
    (tmp_path / "recipe.json").write_text(json.dumps({**recipe_settings, "base": str(base)}))
    good_peak, good_seconds = good(tmp_path)
    ATTACKS[attack](base)
    code, _, peak, seconds = measured(tmp_path, "plan", "recipe.json")
    assert code == 2
    assert peak < good_peak + 500
    assert seconds < good_seconds + 5
