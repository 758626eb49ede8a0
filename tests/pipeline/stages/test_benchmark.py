"""Benchmarks of lm-eval from local task files, on tiny random language models."""

import csv
import json
import os
import random
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import transformers as hf

pytest.importorskip("lm_eval")

from pave_lightning import Recipe, run_recipe
from pave_lightning.cli import main
from pave_lightning.errors import PaveError
from pave_lightning.evaluation.options import LmEval
from pave_lightning.pipeline.comparing import compare
from pave_lightning.pipeline.planning import check_recipe
from pave_lightning.pipeline.run_folder import RunFolder
from pave_lightning.recipe.loading import recipe_to_yaml
from pave_lightning.tasks.predictions import read_predictions

ROWS = 12
CHOICE = """
task: {name}
dataset_path: json
dataset_kwargs: {{data_files: {{test: {data}}}, cache_dir: {cache}}}
test_split: test
output_type: multiple_choice
doc_to_text: "{{{{question}}}}"
doc_to_choice: "{{{{choices}}}}"
doc_to_target: "{{{{gold}}}}"
metric_list:
  - {{metric: acc, aggregation: mean, higher_is_better: true}}
  - {{metric: acc_norm, aggregation: mean, higher_is_better: true}}
"""
WRITING = """
task: {name}
dataset_path: json
dataset_kwargs: {{data_files: {{test: {data}}}, cache_dir: {cache}}}
test_split: test
output_type: generate_until
doc_to_text: "{{{{question}}}}"
doc_to_target: "{{{{answer}}}}"
generation_kwargs: {{until: ["w0"], max_gen_toks: 4, do_sample: false}}
metric_list:
  - {{metric: exact_match, aggregation: mean, higher_is_better: true}}
filter_list:
  - {{name: whole, filter: [{{function: take_first}}]}}
  - {{name: word, filter: [{{function: regex, regex_pattern: "(w[0-9]+)"}}, {{function: take_first}}]}}
"""
ROLLING = """
task: {name}
dataset_path: json
dataset_kwargs: {{data_files: {{test: {data}}}, cache_dir: {cache}}}
test_split: test
output_type: loglikelihood_rolling
doc_to_text: ""
doc_to_target: "{{{{question}}}}"
metric_list:
  - {{metric: word_perplexity, aggregation: weighted_perplexity, higher_is_better: false}}
"""
GROUP = """
group: both
task: [choosing, more]
aggregate_metric_list:
  - {metric: acc, aggregation: mean, weight_by_size: true}
"""


def words_tokenizer():
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from tokenizers.pre_tokenizers import Whitespace

    special = {"pad_token": "<pad>", "eos_token": "</s>", "unk_token": "<unk>"}
    words = [*special.values(), *(f"w{index}" for index in range(61))]
    backend = Tokenizer(WordLevel({word: index for index, word in enumerate(words)}, unk_token="<unk>"))
    backend.pre_tokenizer = Whitespace()
    return hf.PreTrainedTokenizerFast(tokenizer_object=backend, **special)


def drawn(draw, count):
    rows = []
    for _ in range(count):
        words = [f"w{draw.randrange(1, 61)}" for _ in range(draw.randrange(2, 6))]
        choices = [f"w{draw.randrange(1, 61)} w{draw.randrange(1, 61)}", f"w{draw.randrange(1, 61)}"]
        rows.append({"question": " ".join(words), "answer": words[0], "choices": choices, "gold": draw.randrange(2)})
    return rows


def write_rows(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """A base and two experts."""
    place = tmp_path_factory.mktemp("models")
    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    sizes |= {"vocab_size": 64, "max_position_embeddings": 64, "initializer_range": 0.4}
    sizes |= {"pad_token_id": 0, "eos_token_id": 1, "bos_token_id": None}
    with torch.random.fork_rng():
        torch.manual_seed(0)
        hf.LlamaForCausalLM(hf.LlamaConfig(**sizes)).save_pretrained(place / "base")
        for name in ("math", "code"):
            model = hf.LlamaForCausalLM.from_pretrained(place / "base")
            with torch.no_grad():
                for parameter in model.parameters():
                    parameter.add_(0.2 * torch.randn_like(parameter))
            model.save_pretrained(place / name)
    for name in ("base", "math", "code"):
        words_tokenizer().save_pretrained(place / name)
    return place


@pytest.fixture
def task_folder(tmp_path):
    """Task files of lm-eval, with their data."""
    folder = tmp_path / "task files"
    folder.mkdir()
    forms = {"choosing": CHOICE, "more": CHOICE, "writing": WRITING, "rolling": ROLLING}
    for seed, (name, form) in enumerate(forms.items()):
        count = ROWS if name != "more" else ROWS // 2
        data = write_rows(folder / f"{name}.json", drawn(random.Random(seed), count))
        text = form.format(name=name, data=json.dumps(data), cache=json.dumps(str(tmp_path / "cache")))
        (folder / f"{name}.yaml").write_text(text)
    (folder / "both.yaml").write_text(GROUP)
    return folder


@pytest.fixture
def settings(models, task_folder, tmp_path, tracking_uri):
    rows = {
        split: write_rows(tmp_path / f"{split}.jsonl", drawn(random.Random(split), 8))
        for split in ("train", "validation", "test")
    }
    task = {"kind": "causal_lm", "data": rows, "prompt": "question", "response": "answer", "max_new_tokens": 3}
    task |= {"training": {"max_length": 16}, "metrics": ["token_f1", "perplexity"]}
    return {
        "name": "tiny",
        "base": str(models / "base"),
        "output": str(tmp_path / "runs"),
        "trainer": {"accelerator": "cpu", "enable_progress_bar": False},
        "tasks": [{"name": name, **task, "expert": {"from": str(models / name)}} for name in ("math", "code")],
        "capture": {"examples": 8},
        "merge": [{"method": "task_arithmetic", "scale": 0.5, "vectors": ["plain"]}],
        "evaluate": {
            "batch_size": 4,
            "lm_eval": {
                "folder": str(task_folder),
                "benchmarks": {"both": "math", "writing": {"expert": "code", "metric": "exact_match,word"}},
            },
        },
        "tracking": {"uri": tracking_uri},
    }


def changed(settings, **options):
    lm_eval = {**settings["evaluate"]["lm_eval"], **options}
    return {**settings, "evaluate": {**settings["evaluate"], "lm_eval": lm_eval}}


def results_of(folder):
    with (folder / "results.csv").open() as stream:
        return {(row["model"], row["vectors"]): row for row in csv.DictReader(stream)}


def by_command(model, tasks, folder, **options):
    """What lm-eval itself says of a folder."""
    from lm_eval import simple_evaluate
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks import TaskManager

    manager = TaskManager(include_path=str(folder), include_defaults=False)
    lm = HFLM(pretrained=str(model), device="cpu", batch_size=1)
    return simple_evaluate(lm, tasks=tasks, task_manager=manager, bootstrap_iters=0, **options)


def test_scores_are_those_of_lm_eval_on_the_written_folders(settings, models, task_folder, tmp_path, capsys):
    folder = run_recipe(Recipe.model_validate(settings))
    table = results_of(folder)
    experts = {"both": models / "math", "writing": models / "code"}
    for key, place in {
        ("base", ""): lambda _: models / "base",
        ("experts", ""): experts.__getitem__,
        ("task_arithmetic", "plain"): lambda _: folder / "merged" / "task_arithmetic-plain",
    }.items():
        row = table[key]
        both = by_command(place("both"), ["both"], task_folder)["results"]["both"]["acc,none"]
        word = by_command(place("writing"), ["writing"], task_folder)["results"]["writing"]
        assert float(row["both/acc"]) == pytest.approx(both, abs=1e-6)
        assert float(row["writing/exact_match.word"]) == pytest.approx(word["exact_match,word"], abs=1e-6)
        expert = table["experts", ""]
        if float(expert["both/acc"]):
            ratio = float(row["both/acc"]) / float(expert["both/acc"])
            assert float(row["both/normalised"]) == pytest.approx(ratio, abs=1e-5)
        assert float(row["both/acc/low"]) <= float(row["both/acc"]) <= float(row["both/acc/high"])
    assert len({row["both/acc"] for row in table.values()}) > 1  # or else nothing would tell models apart
    manifest = json.loads((folder / "benchmarks" / "writing" / "base" / "manifest.json").read_text())
    assert manifest["result"]["scores"]["writing"]["metrics"].keys() == {"exact_match.whole", "exact_match.word"}
    kept, _ = read_predictions(folder / "benchmarks" / "both" / "base" / "predictions.parquet")
    assert kept["both"].means == ("acc",)
    assert len(kept["both"].rows) == ROWS + ROWS // 2
    card = (folder / "merged" / "task_arithmetic-plain" / "README.md").read_text()
    assert "both" in card
    assert "word" in card
    capsys.readouterr()
    compare(folder, "base", "task_arithmetic-plain")
    assert "both" in capsys.readouterr().out


def test_a_benchmark_that_is_added_costs_no_other_one(settings, caplog):
    recipe = Recipe.model_validate(changed(settings, benchmarks={"choosing": "math"}, limit=4))
    folder = run_recipe(recipe)
    before = (folder / "benchmarks" / "choosing" / "base" / "manifest.json").stat()
    more = Recipe.model_validate(changed(settings, benchmarks={"choosing": "math", "writing": "code"}, limit=4))
    run_recipe(more)
    assert (folder / "benchmarks" / "choosing" / "base" / "manifest.json").stat() == before
    found = json.loads((folder / "benchmarks" / "writing" / "base" / "manifest.json").read_text())
    assert found["result"]["scores"]["writing"]["examples"] == 4
    scored = changed(settings, benchmarks={"choosing": "math", "writing": "code"}, limit=5)
    run_recipe(Recipe.model_validate(scored))
    assert (folder / "benchmarks" / "choosing" / "base" / "manifest.json").stat() != before


def test_metrics_that_fall_are_not_compared(settings):
    recipe = Recipe.model_validate(changed(settings, benchmarks={"rolling": "math"}))
    with pytest.raises(PaveError, match="'word_perplexity' is better the lower it is"):
        run_recipe(recipe)


def test_code_runs_by_the_command_line_alone(settings, task_folder, tmp_path, monkeypatch, capsys):
    path = task_folder / "writing.yaml"
    path.write_text(f"{path.read_text()}unsafe_code: true\n")
    monkeypatch.setenv("HF_ALLOW_CODE_EVAL", "1")
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(recipe_to_yaml(Recipe.model_validate(settings)))
    assert main(["run", str(recipe)]) == 2
    told = capsys.readouterr().err
    assert "evaluate.lm_eval.benchmarks.writing: it runs code that models write" in told
    assert "--allow-code-execution" in told
    assert not (tmp_path / "runs" / "tiny" / "scores").exists()
    assert main(["plan", str(recipe)]) == 0
    assert "pave run takes --allow-code-execution for it" in capsys.readouterr().out
    assert main(["run", str(recipe), "--allow-code-execution"]) == 0
    assert main(["run", str(recipe)]) == 0  # nothing is run any more


def test_python_beside_task_files_is_code(settings, task_folder, tmp_path):
    mark = tmp_path / "was run"
    (task_folder / "own.py").write_text(f"open({str(mark)!r}, 'w').close()\n\ndef text(doc):\n    return 'w1'\n")
    path = task_folder / "writing.yaml"
    path.write_text(path.read_text().replace('doc_to_text: "{{question}}"', "doc_to_text: !function own.text"))
    recipe = Recipe.model_validate(settings)
    with pytest.raises(PaveError, match=r"it runs .*own\.py"):
        run_recipe(recipe)
    check_recipe(recipe, RunFolder(tmp_path / "plan"), evaluates=True)
    assert not mark.exists()
    check_recipe(recipe, RunFolder(tmp_path / "plan"), evaluates=True, allow_code=True)
    assert mark.exists()


def test_templates_reach_no_python(settings, task_folder, tmp_path):
    path = task_folder / "writing.yaml"
    escape = "{{ ''.__class__.__mro__ }}"
    path.write_text(path.read_text().replace("{{question}}", escape))
    with pytest.raises(PaveError, match="unsafe"):
        check_recipe(Recipe.model_validate(settings), RunFolder(tmp_path / "plan"), evaluates=True)


def test_all_that_is_wrong_is_told_at_once(settings, task_folder, tmp_path):
    (task_folder / "choosing.json").unlink()
    (task_folder / "apart.yaml").write_text("group: apart\ntask: [choosing, writing]\n")
    benchmarks = {"choosing": "math", "writin": "code", "apart": "code"}
    recipe = Recipe.model_validate(changed(settings, benchmarks=benchmarks))
    with pytest.raises(PaveError) as caught:
        check_recipe(recipe, RunFolder(tmp_path / "plan"), evaluates=True)
    told = str(caught.value)
    assert "benchmarks.choosing: there is no file" in told
    assert "no task or group 'writin'; did you mean 'writing'?" in told
    assert "benchmarks.apart: it is a group without a score of the whole" in told
    check_recipe(recipe, RunFolder(tmp_path / "plan"))  # what scores nothing needs no benchmarks


@pytest.mark.parametrize(
    ("benchmarks", "told"),
    [
        ({"choosing": "mth"}, "no task is named 'mth'; did you mean 'math'?"),
        ({"math": "math"}, "the task 'math' has the same name"),
        ({"a/b": "math", "a b": "math"}, "the benchmark 'a/b' has the same name"),
        ({}, "at least 1 item"),
    ],
)
def test_recipes_that_cannot_be(settings, benchmarks, told):
    with pytest.raises(ValueError, match=told):
        Recipe.model_validate(changed(settings, benchmarks=benchmarks))


def test_other_models_are_refused(settings, task_files):
    words = {"name": "words", "data": task_files(), "text": "text", "classes": ["low", "high"]}
    with pytest.raises(ValueError, match="'words' is a text_classification task"):
        Recipe.model_validate({**changed(settings, benchmarks={"choosing": "words"}), "tasks": [words]})


def test_options_have_a_short_form():
    assert LmEval.model_validate({"benchmarks": {"gsm8k": "math"}}).benchmarks["gsm8k"].expert == "math"


def test_a_missing_package_is_told(settings, tmp_path, monkeypatch):
    from pave_lightning.evaluation import harness
    from pave_lightning.pipeline import benchmark_facts

    benchmark_facts._facts.cache_clear()
    benchmark_facts._catalogue.cache_clear()
    monkeypatch.setattr(harness, "PACKAGE", "a_package_that_is_not_there")
    with pytest.raises(PaveError, match=r"run: pip install 'pave-lightning\[lm-eval\]'"):
        check_recipe(Recipe.model_validate(settings), RunFolder(tmp_path / "plan"), evaluates=True)


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_two_processes_score_as_one(settings, tmp_path):
    settings = changed(settings, benchmarks={"both": "math", "writing": "code"})
    folder = run_recipe(Recipe.model_validate(settings))
    one = Path(shutil.move(folder / "benchmarks", tmp_path / "one"))
    path = tmp_path / "two.yaml"
    trainer = {**settings["trainer"], "devices": 2, "strategy": "ddp"}
    path.write_text(recipe_to_yaml(Recipe.model_validate({**settings, "trainer": trainer})))
    command = [sys.executable, "-m", "pave_lightning", "evaluate", str(path)]
    threads = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=500, env=threads)
    assert done.returncode == 0, done.stdout + done.stderr
    for name in ("both", "writing"):
        for label in ("base", "experts", "task_arithmetic-plain"):
            first, second = (place / name / label for place in (one, folder / "benchmarks"))
            scores = [
                json.loads((place / "manifest.json").read_text())["result"]["scores"] for place in (first, second)
            ]
            assert scores[0] == scores[1]
            kept = [read_predictions(place / "predictions.parquet")[0][name] for place in (first, second)]
            assert kept[0].same_rows(kept[1])
            assert kept[0].predictions.tolist() == kept[1].predictions.tolist()
