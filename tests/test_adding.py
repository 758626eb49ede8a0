"""Adding an expert to a merged model."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModel, AutoTokenizer

from pave_lightning import Recipe, load_merged
from pave_lightning.adding import add_expert
from pave_lightning.cli import main
from pave_lightning.commands import open_folder, run_stage
from pave_lightning.errors import PaveError
from pave_lightning.statistics.gradients import TaskGradients
from pave_lightning.weights import Checkpoint


@pytest.fixture
def merge_all(ready_settings):
    """Merge some experts by sequential rules and ties; gives the folder of each."""

    def run(tasks, name, rules=("opcm", "average", "task_arithmetic", "perturb_and_merge", "ties")):
        scales = {"task_arithmetic": {"scale": 0.5}}
        steps = [{"method": rule, "vectors": ["plain"], **scales.get(rule, {})} for rule in rules]
        recipe = Recipe.model_validate({**ready_settings, "name": name, "tasks": tasks, "merge": steps})
        run_stage(recipe, "fit")
        run_stage(recipe, "merge")
        root = open_folder(recipe).root / "merged"
        return {folder.name.removesuffix("-plain"): folder for folder in root.iterdir()}

    return run


@pytest.fixture
def three(ready_settings, base_folder, make_expert):
    first, second = ready_settings["tasks"]
    return [first, second, {**first, "name": "third", "expert": {"from": str(make_expert(base_folder, seed=9))}}]


def weights(folder):
    checkpoint = Checkpoint(folder, "bert")
    return {name: checkpoint.tensor(name) for name in checkpoint if checkpoint.backbone[name].is_floating}


def fisher_of(folders, task):
    return folders["opcm"].parents[1] / "gradients" / f"fisher-{task}"


def test_adding_gives_what_merging_all_gives(merge_all, three, tmp_path):
    two, all_three = merge_all(three[:2], "two"), merge_all(three, "three")
    expert = three[2]["expert"]["from"]
    for rule in ("opcm", "average", "task_arithmetic", "perturb_and_merge"):
        fisher = fisher_of(all_three, "third") if rule == "perturb_and_merge" else None
        added = add_expert(two[rule], "third", expert, tmp_path / rule, fisher)
        found, expected = weights(added), weights(all_three[rule])
        for name, value in expected.items():
            assert torch.allclose(found[name], value, atol=2e-5), (rule, name)
        assert sorted(head.name for head in (added / "heads").iterdir()) == ["more", "third", "words"]
        facts, others = (json.loads((folder / "pave.json").read_text()) for folder in (added, all_three[rule]))
        assert facts["added"] == ["third"]
        assert facts["sequential"]["merged"] == others["sequential"]["merged"] == 3
        assert facts["sequential"]["divisor"] == pytest.approx(others["sequential"]["divisor"], rel=1e-4)
        for task in ("words", "third"):
            assert load_merged(added, task) is not None


def test_mistakes_are_told_and_nothing_is_left_behind(merge_all, three, tmp_path, capsys):
    folders = merge_all(three[:2], "two")
    expert = three[2]["expert"]["from"]
    output = tmp_path / "out" / "result"
    with pytest.raises(PaveError, match=r"was merged by 'ties', which cannot .* later; rules that can: average, opcm,"):
        add_expert(folders["ties"], "third", expert, output)
    with pytest.raises(PaveError, match="has a task 'words' already"):
        add_expert(folders["opcm"], "words", expert, output)
    with pytest.raises(PaveError, match="cannot name a task"):
        add_expert(folders["opcm"], "a/b", expert, output)
    with pytest.raises(PaveError, match="is no merged model"):
        add_expert(tmp_path, "third", expert, output)
    broken = tmp_path / "broken"
    shutil.copytree(folders["opcm"], broken)
    facts = json.loads((broken / "pave.json").read_text())
    facts["sequential"]["divisor"] = 0.0
    (broken / "pave.json").write_text(json.dumps(facts))
    with pytest.raises(PaveError, match="no expert can be added"):
        add_expert(broken, "third", expert, output)
    assert not output.parent.exists() or not list(output.parent.iterdir())
    headless = tmp_path / "headless"
    AutoModel.from_pretrained(expert).save_pretrained(headless)
    other = tmp_path / "other"
    shutil.copytree(expert, other)
    still = tmp_path / "still"
    shutil.copytree(expert, still)
    base = Checkpoint(Path(json.loads((folders["opcm"] / "pave.json").read_text())["base"]), "bert")
    weights = load_file(still / "model.safetensors")
    weights |= {f"bert.{name}": base.tensor(name) for name in base if f"bert.{name}" in weights}
    save_file(weights, still / "model.safetensors", metadata={"format": "pt"})
    tokenizer = json.loads((other / "tokenizer.json").read_text())
    tokenizer["model"]["vocab"]["w0"], tokenizer["model"]["vocab"]["w1"] = 5, 4
    (other / "tokenizer.json").write_text(json.dumps(tokenizer))
    AutoTokenizer.from_pretrained(expert).save_pretrained(headless)
    with pytest.raises(PaveError, match="it has no classification head"):
        add_expert(folders["opcm"], "third", str(headless), output)
    with pytest.raises(PaveError, match="its backbone is the base's, so there is nothing to merge"):
        add_expert(folders["opcm"], "third", str(still), output)
    with pytest.raises(PaveError, match="its vocabulary is another one"):
        add_expert(folders["opcm"], "third", str(other), output)
    facts["sequential"]["divisor"], facts["base_digest"] = 1.0, "0" * 64
    (broken / "pave.json").write_text(json.dumps(facts))
    with pytest.raises(PaveError, match="is no longer what it was when"):
        add_expert(broken, "third", expert, output)
    (broken / "pave.json").write_text(json.dumps({**facts, "scale": 0.0}))
    with pytest.raises(PaveError, match="was merged with scale 0"):
        add_expert(broken, "third", expert, output)
    assert not output.parent.exists() or not list(output.parent.iterdir())
    output.mkdir(parents=True)
    with pytest.raises(PaveError, match="exists already"):
        add_expert(folders["opcm"], "third", expert, output)


def test_adding_by_fisher_information(merge_all, three, tmp_path):
    two = merge_all(three[:2], "two", ["opcm", "perturb_and_merge"])
    all_three = merge_all(three, "three", ["opcm", "perturb_and_merge"])
    rule, expert, fisher = two["perturb_and_merge"], three[2]["expert"]["from"], fisher_of(all_three, "third")
    added = add_expert(rule, "third", expert, tmp_path / "three", fisher / "gradients.safetensors")
    found, expected = (Checkpoint(f / "sequential" / "pull", "bert") for f in (added, all_three["perturb_and_merge"]))
    assert set(found) == set(expected) != set()
    for name in expected:
        assert torch.allclose(found.tensor(name), expected.tensor(name), rtol=1e-4, atol=1e-9), name
    fourth = add_expert(added, "fourth", three[0]["expert"]["from"], tmp_path / "four", fisher_of(all_three, "words"))
    facts = json.loads((fourth / "pave.json").read_text())
    assert (facts["added"], facts["sequential"]["merged"]) == (["third", "fourth"], 4)

    output = tmp_path / "out" / "result"
    with pytest.raises(PaveError, match=r"needs the Fisher information of the new expert: .* --fisher\. `pave merge"):
        add_expert(rule, "third", expert, output)
    with pytest.raises(PaveError, match="'opcm' uses no Fisher information; leave --fisher away"):
        add_expert(two["opcm"], "third", expert, output, fisher)
    with pytest.raises(PaveError, match=r"no gradients at .*gradients\.safetensors: take them first"):
        add_expert(rule, "third", expert, output, tmp_path)
    with pytest.raises(PaveError, match=r"gradients at .*fisher-words were taken of another expert than"):
        add_expert(rule, "third", expert, output, fisher_of(all_three, "words"))
    gradients = TaskGradients.load(fisher / "gradients.safetensors")
    few = {name: gradients[name] for name in list(gradients)[1:]}
    for kind, values, told in (
        ("absolute", dict(gradients), "expected Fisher information, found 'absolute' gradients"),
        ("fisher", few, "the Fisher information: there are none of 1 of"),
    ):
        TaskGradients(kind, values, examples=1).save(tmp_path / "wrong.safetensors")
        with pytest.raises(PaveError, match=f"task 'third': {told}"):
            add_expert(rule, "third", expert, output, tmp_path / "wrong.safetensors")
    broken = tmp_path / "broken"
    shutil.copytree(rule, broken)
    shutil.rmtree(broken / "sequential" / "pull")
    with pytest.raises(PaveError, match=r"kept for adding experts cannot be read: .*; merge all experts again"):
        add_expert(broken, "third", expert, output, fisher)
    facts = json.loads((broken / "pave.json").read_text())
    del facts["sequential"]
    (broken / "pave.json").write_text(json.dumps(facts))
    with pytest.raises(PaveError, match="was merged before 'perturb_and_merge' could take in experts later; merge all"):
        add_expert(broken, "third", expert, output, fisher)
    assert not output.parent.exists() or not list(output.parent.iterdir())


def test_on_the_command_line(merge_all, three, capsys):
    folders = merge_all(three[:2], "two", ["opcm", "perturb_and_merge"])
    folder = folders["opcm"]
    expert = three[2]["expert"]["from"]
    assert main(["merge", "--into", str(folder), "--add", f"third={expert}"]) == 0
    assert capsys.readouterr().out.strip() == f"results: {folder}-third"
    assert (folder.parent / f"{folder.name}-third" / "heads" / "third").is_dir()
    by_fisher, fisher = str(folders["perturb_and_merge"]), str(fisher_of(folders, "words"))
    again = three[0]["expert"]["from"]
    assert main(["merge", "--into", by_fisher, "--add", f"third={again}", "--fisher", fisher]) == 0
    assert capsys.readouterr().out.strip() == f"results: {by_fisher}-third"
    for arguments, told in (
        ([], "give a recipe, or add an expert"),
        (["--into", str(folder)], "give both --into MERGED and --add TASK=EXPERT"),
        (["--into", str(folder), "--add", expert], "give both --into MERGED and --add TASK=EXPERT"),
        (["recipe.yaml", "--into", str(folder), "--add", "a=b"], "not both"),
        (["recipe.yaml", "--output", "somewhere"], "not both"),
        (["recipe.yaml", "--fisher", fisher], "not both"),
        (["--into", by_fisher, "--add", f"more2={expert}"], "needs the Fisher information of the new expert"),
        (["--into", str(folder), "--add", "a=b", "--set", "seed=1"], "--set and --print-config go with a recipe"),
    ):
        assert main(["merge", *arguments]) == 2
        assert told in capsys.readouterr().err
