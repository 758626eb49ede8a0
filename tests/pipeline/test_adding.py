"""Adding an expert to a merged model."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, TaskType, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AutoModel, AutoModelForSequenceClassification, AutoTokenizer

from pave_lightning import Recipe, load_merged
from pave_lightning.cli import main
from pave_lightning.errors import Interrupted, PaveError
from pave_lightning.pipeline import adding
from pave_lightning.pipeline.adding import add_expert
from pave_lightning.pipeline.commands import open_folder, run_stage
from pave_lightning.statistics.gradients import TaskGradients
from pave_lightning.weights import Checkpoint


@pytest.fixture(scope="module")
def three(ready_settings_in, base_folder, make_expert):
    first, second = ready_settings_in("runs")["tasks"]
    return [first, second, {**first, "name": "third", "expert": {"from": str(make_expert(base_folder, seed=9))}}]


@pytest.fixture(scope="module")
def merged(ready_settings_in, tmp_path_factory):
    """Merge some experts by sequential methods and ties; gives the folder of each, only to be read."""

    def run(tasks, name):
        methods = {"opcm": {}, "average": {}, "task_arithmetic": {"scale": 0.5}, "perturb_and_merge": {}, "ties": {}}
        steps = [{"method": method, "vectors": ["plain"], **more} for method, more in methods.items()]
        settings = ready_settings_in(tmp_path_factory.mktemp("merged"))
        recipe = Recipe.model_validate({**settings, "name": name, "tasks": tasks, "merge": steps})
        run_stage(recipe, "fit")
        run_stage(recipe, "merge")
        root = open_folder(recipe).root / "merged"
        return {folder.name.removesuffix("-plain"): folder for folder in root.iterdir()}

    return run


@pytest.fixture(scope="module")
def two(merged, three):
    return merged(three[:2], "two")


@pytest.fixture(scope="module")
def all_three(merged, three):
    return merged(three, "three")


def weights(folder):
    checkpoint = Checkpoint(folder, "bert")
    return {name: checkpoint.tensor(name) for name in checkpoint if checkpoint.backbone[name].is_floating}


def fisher_of(folders, task):
    return folders["opcm"].parents[1] / "gradients" / f"fisher-{task}"


def test_adding_gives_what_merging_all_gives(two, all_three, three, tmp_path):
    expert = three[2]["expert"]["from"]
    for method in ("opcm", "average", "task_arithmetic", "perturb_and_merge"):
        fisher = fisher_of(all_three, "third") if method == "perturb_and_merge" else None
        added = add_expert(two[method], "third", expert, tmp_path / method, fisher)
        found, expected = weights(added), weights(all_three[method])
        for name, value in expected.items():
            assert torch.allclose(found[name], value, atol=2e-5), (method, name)
        assert sorted(head.name for head in (added / "heads").iterdir()) == ["more", "third", "words"]
        facts, others = (json.loads((folder / "pave.json").read_text()) for folder in (added, all_three[method]))
        assert facts["added"] == ["third"]
        assert facts["sequential"]["merged"] == others["sequential"]["merged"] == 3
        assert facts["sequential"]["divisor"] == pytest.approx(others["sequential"]["divisor"], rel=1e-4)
        for task in ("words", "third"):
            assert load_merged(added, task) is not None


def test_mistakes_are_told_and_nothing_is_left_behind(two, three, tmp_path):
    expert = three[2]["expert"]["from"]
    output = tmp_path / "out" / "result"
    with pytest.raises(
        PaveError, match=r"was merged by 'ties', which cannot .* later; methods that can: average, opcm,"
    ):
        add_expert(two["ties"], "third", expert, output)
    with pytest.raises(PaveError, match="has a task 'words' already"):
        add_expert(two["opcm"], "words", expert, output)
    with pytest.raises(PaveError, match=r"'a/b' cannot name a task: expected letters, .* first a letter or a digit"):
        add_expert(two["opcm"], "a/b", expert, output)
    with pytest.raises(PaveError, match="is no merged model"):
        add_expert(tmp_path, "third", expert, output)
    broken = tmp_path / "broken"
    shutil.copytree(two["opcm"], broken)
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
    base = Checkpoint(Path(json.loads((two["opcm"] / "pave.json").read_text())["base"]), "bert")
    weights = load_file(still / "model.safetensors")
    weights |= {f"bert.{name}": base.tensor(name) for name in base if f"bert.{name}" in weights}
    save_file(weights, still / "model.safetensors", metadata={"format": "pt"})
    tokenizer = json.loads((other / "tokenizer.json").read_text())
    tokenizer["model"]["vocab"]["w0"], tokenizer["model"]["vocab"]["w1"] = 5, 4
    (other / "tokenizer.json").write_text(json.dumps(tokenizer))
    AutoTokenizer.from_pretrained(expert).save_pretrained(headless)
    with pytest.raises(PaveError, match="which has no head"):
        add_expert(two["opcm"], "third", str(headless), output)
    with pytest.raises(PaveError, match="its backbone is the base's, so there is nothing to merge"):
        add_expert(two["opcm"], "third", str(still), output)
    with pytest.raises(PaveError, match="its vocabulary is not the base's: 2 tokens differ"):
        add_expert(two["opcm"], "third", str(other), output)
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
        add_expert(two["opcm"], "third", expert, output)


@pytest.fixture
def adapter(base_folder, tmp_path):
    """A peft adapter of the base with a head of three outputs, and the whole model that it gives."""
    with torch.random.fork_rng():
        torch.manual_seed(3)
        model = AutoModelForSequenceClassification.from_pretrained(base_folder, num_labels=3)
        adapted = get_peft_model(model, LoraConfig(task_type=TaskType.SEQ_CLS, r=2, target_modules=["query", "dense"]))
        for name, parameter in adapted.named_parameters():
            if "lora_B" in name:
                torch.nn.init.normal_(parameter, std=0.05)
    adapted.save_pretrained(tmp_path / "adapter")
    adapted.merge_and_unload().save_pretrained(tmp_path / "whole")
    AutoTokenizer.from_pretrained(base_folder).save_pretrained(tmp_path / "whole")
    return tmp_path / "adapter", tmp_path / "whole"


def test_an_adapter_is_added_as_the_whole_model_it_gives(two, adapter, tmp_path):
    adapted, whole = (add_expert(two["opcm"], "third", str(e), tmp_path / f"with-{e.name}") for e in adapter)
    expected = weights(whole)
    assert all(torch.allclose(value, expected[name], atol=1e-6) for name, value in weights(adapted).items())
    assert not torch.equal(
        expected["encoder.layer.0.output.dense.weight"], weights(two["opcm"])["encoder.layer.0.output.dense.weight"]
    )
    text = AutoTokenizer.from_pretrained(whole)(["w3 w50 w7"], return_tensors="pt")
    logits = [load_merged(folder, "third")(**text).logits for folder in (adapted, whole)]
    assert logits[0].shape == (1, 3)
    torch.testing.assert_close(*logits, atol=1e-5, rtol=1e-5)
    with pytest.raises(PaveError, match="is an adapter, but Fisher information is that of a whole model"):
        add_expert(two["perturb_and_merge"], "third", str(adapter[0]), tmp_path / "no", tmp_path)
    file = adapter[0] / "adapter_model.safetensors"
    save_file({name: tensor for name, tensor in load_file(file).items() if "classifier" not in name}, file)
    with pytest.raises(PaveError, match=r"task 'third': the adapter .* holds no head"):
        add_expert(two["opcm"], "third", str(adapter[0]), tmp_path / "no")
    assert not (tmp_path / "no").exists()


def test_a_result_says_what_it_is_and_can_be_scored_as_its_card_says(two, three, ready_settings, tmp_path):
    folder = add_expert(two["opcm"], "third", three[2]["expert"]["from"], tmp_path / "grown")
    card = (folder / "README.md").read_text()
    assert card.startswith("---\nlibrary_name: transformers\n")
    for told in ("# grown", "| method | `opcm` |", "more, third, words", three[2]["expert"]["from"], "`pave evaluate`"):
        assert told in card
    (tmp_path / "new").mkdir()
    modes = [
        path.stat().st_mode for path in (folder, tmp_path / "new", folder / "model.safetensors", folder / "README.md")
    ]
    assert (modes[0], modes[2]) == (modes[1], modes[3]), "others may read it as any new folder and file"
    tasks = []
    for task in three:
        scored = tmp_path / "scored" / task["name"]
        load_merged(folder, task["name"]).save_pretrained(scored)
        AutoTokenizer.from_pretrained(folder).save_pretrained(scored)
        tasks.append({**task, "expert": {"from": str(scored)}})
    recipe = Recipe.model_validate({**ready_settings, "name": "scored", "tasks": tasks, "merge": []})
    for stage in ("fit", "evaluate", "report"):
        run_stage(recipe, stage)
    found = json.loads((open_folder(recipe).root / "scores" / "experts" / "manifest.json").read_text())
    rows = [json.loads(line) for line in Path(three[0]["data"]["test"]).read_text().splitlines()]
    model, tokenizer = load_merged(folder, "words"), AutoTokenizer.from_pretrained(folder)
    right = [int(model(**tokenizer(r["text"], return_tensors="pt")).logits.argmax()) == r["label"] for r in rows]
    assert found["result"]["scores"]["words"]["metrics"]["accuracy"] == pytest.approx(sum(right) / len(rows))


def test_being_stopped_leaves_nothing_behind(two, three, tmp_path, monkeypatch):
    def stop(folder, *args, **kwargs):
        (folder / "model.safetensors").write_text("half")
        raise Interrupted(143)

    monkeypatch.setattr(adding, "write_merged", stop)
    with pytest.raises(Interrupted):
        add_expert(two["opcm"], "third", three[2]["expert"]["from"], tmp_path / "out" / "grown")
    assert not list((tmp_path / "out").iterdir())


def test_adding_by_fisher_information(two, all_three, three, tmp_path):
    method, expert, fisher = two["perturb_and_merge"], three[2]["expert"]["from"], fisher_of(all_three, "third")
    added = add_expert(method, "third", expert, tmp_path / "three", fisher / "gradients.safetensors")
    found, expected = (Checkpoint(f / "sequential" / "pull", "bert") for f in (added, all_three["perturb_and_merge"]))
    assert set(found) == set(expected) != set()
    for name in expected:
        assert torch.allclose(found.tensor(name), expected.tensor(name), rtol=1e-4, atol=1e-9), name
    fourth = add_expert(added, "fourth", three[0]["expert"]["from"], tmp_path / "four", fisher_of(all_three, "words"))
    facts = json.loads((fourth / "pave.json").read_text())
    assert (facts["added"], facts["sequential"]["merged"]) == (["third", "fourth"], 4)

    output = tmp_path / "out" / "result"
    with pytest.raises(PaveError, match=r"needs the Fisher information of the new expert: .* two tasks or more"):
        add_expert(method, "third", expert, output)
    with pytest.raises(PaveError, match="'opcm' uses no Fisher information; leave --fisher away"):
        add_expert(two["opcm"], "third", expert, output, fisher)
    with pytest.raises(PaveError, match=r"no gradients at .*gradients\.safetensors: take them first"):
        add_expert(method, "third", expert, output, tmp_path)
    with pytest.raises(PaveError, match=r"gradients at .*fisher-words were taken of another expert than"):
        add_expert(method, "third", expert, output, fisher_of(all_three, "words"))
    gradients = TaskGradients.load(fisher / "gradients.safetensors")
    few = {name: gradients[name] for name in list(gradients)[1:]}
    for kind, values, told in (
        (
            "absolute",
            dict(gradients),
            r"expected Fisher information \(in a run folder gradients/fisher-TASK\), found labelled gradients",
        ),
        ("fisher", few, "the Fisher information: there are none of 1 of"),
    ):
        TaskGradients(kind, values, examples=1).save(tmp_path / "wrong.safetensors")
        with pytest.raises(PaveError, match=f"task 'third': {told}"):
            add_expert(method, "third", expert, output, tmp_path / "wrong.safetensors")
    broken = tmp_path / "broken"
    shutil.copytree(method, broken)
    shutil.rmtree(broken / "sequential" / "pull")
    with pytest.raises(PaveError, match=r"kept for adding experts cannot be read: .*; merge all experts again"):
        add_expert(broken, "third", expert, output, fisher)
    facts = json.loads((broken / "pave.json").read_text())
    del facts["sequential"]
    (broken / "pave.json").write_text(json.dumps(facts))
    with pytest.raises(PaveError, match="was merged before 'perturb_and_merge' could take in experts later; merge all"):
        add_expert(broken, "third", expert, output, fisher)
    assert not output.parent.exists() or not list(output.parent.iterdir())


def test_on_the_command_line(two, three, tmp_path, capsys):
    fisher = str(fisher_of(two, "words"))
    # Results are written beside the merged model.
    folder, by_fisher = (shutil.copytree(two[method], tmp_path / method) for method in ("opcm", "perturb_and_merge"))
    expert = three[2]["expert"]["from"]
    assert main(["merge", "--into", str(folder), "--add", f"third={expert}"]) == 0
    assert capsys.readouterr().out.strip() == f"results: {folder}-third"
    assert (folder.parent / f"{folder.name}-third" / "heads" / "third").is_dir()
    by_fisher, again = str(by_fisher), three[0]["expert"]["from"]
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
