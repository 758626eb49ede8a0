"""The paper's recipes of models that write, on tiny models of the same architectures and a few rows."""

import csv
import importlib.util
import json
import random
from pathlib import Path

import pytest
import torch
import transformers as hf
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file

from pave_lightning import load_recipe
from pave_lightning.cli import main
from pave_lightning.tasks.data import sample_rows

PAPER = Path(__file__).parents[2] / "recipes" / "paper"
SPECIAL = {"pad_token": "<pad>", "eos_token": "</s>", "unk_token": "<unk>"}
GLUE = ("cola", "sst2", "mrpc", "stsb", "qqp", "mnli", "qnli", "rte")
TEXTS = {
    "cola": ["sentence"],
    "sst2": ["sentence"],
    "qqp": ["question1", "question2"],
    "mnli": ["premise", "hypothesis"],
    "qnli": ["question", "sentence"],
}


def words_tokenizer():
    """A tokenizer of the words w0 to w95 and three special ones."""
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from tokenizers.pre_tokenizers import Whitespace

    words = [*SPECIAL.values(), *(f"w{index}" for index in range(96))]
    backend = Tokenizer(WordLevel({word: index for index, word in enumerate(words)}, unk_token="<unk>"))
    backend.pre_tokenizer = Whitespace()
    return hf.PreTrainedTokenizerFast(tokenizer_object=backend, **SPECIAL)


def sentence(draw):
    return " ".join(f"w{draw.randrange(96)}" for _ in range(draw.randrange(3, 8)))


def write_rows(path, rows):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


@torch.no_grad()
def changed(model, size=0.02):
    for parameter in model.parameters():
        parameter.add_(size * torch.randn_like(parameter))
    return model


def run(name, folder, tracking_uri, overrides, *options):
    """Plan and run a recipe of the paper with these overrides; its rows of the table, and its folder."""
    overrides = [
        *(f"base={folder / 'base'}", f"output={folder / 'runs'}", f"tracking.uri={tracking_uri}"),
        *("trainer.enable_progress_bar=false", "capture.examples=8", "examples={train: 40, validation: 4, test: 6}"),
        *overrides,
    ]
    settings = [part for override in overrides for part in ("--set", override)]
    path = str(PAPER / f"{name}.yaml")
    assert main(["plan", path, *settings]) == 0
    assert main(["run", path, *settings, *options]) == 0
    with (folder / "runs" / name / "results.csv").open() as stream:
        rows = list(csv.DictReader(stream))
    return {(row["model"], row["vectors"]): row for row in rows}, folder / "runs" / name


def test_scales_and_ratios_are_the_published_ones():
    steps = load_recipe(PAPER / "llama2_math_code.yaml").merge
    found = [(step.method, step.scale, step.purify.rho, step.purify.damping) for step in steps]
    assert found == [("task_arithmetic", 1.0, 0.99829102, 0.01), ("task_arithmetic", 0.5, 0.9987793, 0.5)]
    steps = load_recipe(PAPER / "flan_t5_glue_lora.yaml").merge
    assert [(step.method, step.scale) for step in steps] == [("average", None), ("task_arithmetic", 0.3), ("ties", 0.3)]


def perplexity(folder, rows):
    """That of the responses of rows, by hand, with a model's own tokens."""
    model, tokenizer = hf.AutoModelForCausalLM.from_pretrained(folder), hf.AutoTokenizer.from_pretrained(folder)
    losses = []
    for row in rows:
        prompt = tokenizer(row["question"] + "\n")["input_ids"]
        response = [*tokenizer(row["answer"])["input_ids"], tokenizer.eos_token_id]
        with torch.no_grad():
            logits = model.eval()(torch.tensor([prompt + response])).logits[0, len(prompt) - 1 : -1]
        losses.append(torch.nn.functional.cross_entropy(logits, torch.tensor(response), reduction="none"))
    return torch.cat(losses).mean().exp().item()


BENCHMARKS = {"gsm8k": False, "minerva_math": False, "humaneval": True, "mbpp": True}
STAND_IN = """
task: {name}
dataset_path: json
dataset_kwargs: {{data_files: {{test: {data}}}, cache_dir: {cache}}}
unsafe_code: {runs_code}
test_split: test
output_type: generate_until
doc_to_text: "{{{{question}}}}"
doc_to_target: "{{{{answer}}}}"
generation_kwargs: {{until: ["w0"], max_gen_toks: 4, do_sample: false}}
metric_list:
  - {{metric: exact_match, aggregation: mean, higher_is_better: true}}
"""


def stand_in_benchmarks(folder):
    """Task files by the names of the published benchmarks; whether lm-eval is there to read them."""
    for name, runs_code in BENCHMARKS.items():
        rows = [{"question": sentence(random.Random(name)), "answer": f"w{place}"} for place in range(4)]
        write_rows(folder / f"{name}.json", rows)
        places = {"data": json.dumps(str(folder / f"{name}.json")), "cache": json.dumps(str(folder / "cache"))}
        (folder / f"{name}.yaml").write_text(STAND_IN.format(name=name, runs_code=json.dumps(runs_code), **places))
    return importlib.util.find_spec("lm_eval") is not None


@pytest.mark.slow
@pytest.mark.parametrize("tied", [False, True])
def test_llama_runs_from_one_file(tmp_path, tracking_uri, tied):
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
    sizes |= {"vocab_size": 99, "max_position_embeddings": 512, "pad_token_id": 0, "eos_token_id": 1}
    sizes |= {"bos_token_id": None, "tie_word_embeddings": tied}
    draw = random.Random(0)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        base = hf.LlamaForCausalLM(hf.LlamaConfig(**sizes))
        base.save_pretrained(tmp_path / "base")
        words_tokenizer().save_pretrained(tmp_path / "base")
        for task in ("math", "code"):
            expert = changed(hf.LlamaForCausalLM.from_pretrained(tmp_path / "base"))
            tokenizer = words_tokenizer()
            if task == "math":  # as WizardMath, which has a token more
                tokenizer.add_tokens(["[PAD]"])
                expert.resize_token_embeddings(100, mean_resizing=False)
            expert.save_pretrained(tmp_path / task)
            tokenizer.save_pretrained(tmp_path / task)
    for split, count in (("train", 60), ("test", 12)):
        write_rows(
            tmp_path / "gsm8k" / "main" / f"{split}.jsonl",
            [{"question": sentence(draw), "answer": sentence(draw)} for _ in range(count)],
        )
    feedback = [{"query": sentence(draw), "answer": sentence(draw), "lang": "python"} for _ in range(80)]
    write_rows(tmp_path / "feedback" / "train.jsonl", feedback)
    math, code = "tasks.math.data", "tasks.code.data"
    overrides = [
        f"{math}.hub=null",
        f"{math}.folder={tmp_path / 'gsm8k'}",
        f"tasks.math.expert.from={tmp_path / 'math'}",
    ]
    overrides += [f"{code}.hub=null", f"{code}.folder={tmp_path / 'feedback'}"]
    overrides += [f"tasks.code.expert.from={tmp_path / 'code'}", "evaluate.precision=32-true"]
    overrides += [f"tasks.{task}.max_new_tokens=12" for task in ("math", "code")]
    has_harness = stand_in_benchmarks(tmp_path / "benchmarks")
    overrides.append(f"evaluate.lm_eval.folder={tmp_path / 'benchmarks'}" if has_harness else "evaluate.lm_eval=null")
    rows, root = run("llama2_math_code", tmp_path, tracking_uri, overrides, "--allow-code-execution")
    if has_harness:
        assert all(row[f"{name}/exact_match"] for name in BENCHMARKS for row in rows.values())
    steps = ("task_arithmetic", "task_arithmetic_half")
    assert rows.keys() >= {(step, vectors) for step in steps for vectors in ("plain", "purified")}
    weight = "model.layers.1.mlp.up_proj.weight"
    base, *experts = (load_file(tmp_path / one / "model.safetensors")[weight] for one in ("base", "math", "code"))
    merged = load_file(root / "merged" / "task_arithmetic_half-plain" / "model.safetensors")
    assert torch.allclose(merged[weight], base + 0.5 * sum(expert - base for expert in experts), atol=1e-6)
    if not tied:
        head = "lm_head.weight"
        base, *experts = (load_file(tmp_path / one / "model.safetensors")[head] for one in ("base", "math", "code"))
        expected = base + 0.5 * sum(expert[:99] - base for expert in experts)
        assert torch.allclose(merged[head], expected, atol=1e-6)
    lines = (tmp_path / "gsm8k" / "main" / "test.jsonl").read_text().splitlines()
    used = [json.loads(lines[place]) for place in sample_rows(len(lines), 6, seed=0)]
    own = {"base": tmp_path / "base", "experts": tmp_path / "math"}
    for model in (*own, "task_arithmetic-plain", "task_arithmetic_half-purified"):
        manifest = json.loads((root / "scores" / model / "manifest.json").read_text())
        found = manifest["result"]["scores"]["math"]["metrics"]["perplexity"]
        assert found == pytest.approx(perplexity(own.get(model, root / "merged" / model), used), rel=1e-5)


@pytest.fixture(scope="module")
def prompts():
    """The script that writes the rows of Flan-T5."""
    place = importlib.util.spec_from_file_location("glue_prompts", PAPER / "glue_prompts.py")
    module = importlib.util.module_from_spec(place)
    place.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def glue_prompts(prompts, tmp_path_factory):
    """Rows of GLUE as prompts."""
    folder, draw = tmp_path_factory.mktemp("glue"), random.Random(0)
    for task in GLUE:
        for split in ("train", "validation_matched" if task == "mnli" else "validation"):
            classes = 3 if task == "mnli" else 2
            label = (lambda n: n % 5 + 0.25) if task == "stsb" else (lambda n, classes=classes: n % classes)
            names = TEXTS.get(task, ["sentence1", "sentence2"])
            write_rows(
                folder / task / f"{split}.jsonl",
                [{name: sentence(draw) for name in names} | {"label": label(place)} for place in range(30)],
            )
    prompts.write_prompts(folder / "prompts", str(folder))
    return folder / "prompts"


def test_prompts_are_those_of_the_benchmark(glue_prompts):
    def first(task, split="test"):
        return json.loads((glue_prompts / task / f"{split}.jsonl").read_text().splitlines()[0])

    rows = {task: first(task) for task in GLUE}
    answers = {task: row["response"] for task, row in rows.items()}
    assert answers == {
        **{"cola": "unacceptable", "sst2": "negative", "mrpc": "no", "stsb": "0.2", "qqp": "no"},
        **{"mnli": "entailment", "qnli": "yes", "rte": "yes"},
    }
    source = json.loads((glue_prompts.parent / "qnli" / "validation.jsonl").read_text().splitlines()[0])
    assert rows["qnli"]["prompt"] == (
        f"Given the context: '{source['sentence']}', does the question '{source['question']}' have an answer based on "
        "the information provided? Answer with 'yes' or 'no'."
    )
    counts = [len((glue_prompts / "mnli" / f"{split}.jsonl").read_text().splitlines()) for split in ("train", "test")]
    assert counts == [27, 30]


@pytest.mark.slow
def test_flan_t5_runs_from_one_file(tmp_path, tracking_uri, glue_prompts):
    sizes = {"d_model": 32, "d_ff": 64, "d_kv": 16, "num_layers": 2, "num_heads": 2, "vocab_size": 99}
    config = hf.T5Config(
        **sizes, feed_forward_proj="gated-gelu", tie_word_embeddings=False, decoder_start_token_id=0, pad_token_id=0
    )
    overrides = []
    with torch.random.fork_rng():
        torch.manual_seed(0)
        hf.T5ForConditionalGeneration(config).save_pretrained(tmp_path / "base")
        words_tokenizer().save_pretrained(tmp_path / "base")
        for task in GLUE:
            model = hf.T5ForConditionalGeneration.from_pretrained(tmp_path / "base")
            lora = LoraConfig(r=16, target_modules=["q", "v"], task_type="SEQ_2_SEQ_LM", init_lora_weights=False)
            get_peft_model(model, lora).save_pretrained(tmp_path / "experts" / task)
            overrides.append(f"tasks.{task}.data.folder={glue_prompts}")
            overrides.append(f"tasks.{task}.expert.from={tmp_path / 'experts' / task}")
    rows, root = run("flan_t5_glue_lora", tmp_path, tracking_uri, overrides)
    steps = ("average", "task_arithmetic", "ties")
    assert rows.keys() >= {(step, vectors) for step in steps for vectors in ("plain", "purified")}
    assert (root / "merged" / "ties-plain" / "model.safetensors").is_file()
