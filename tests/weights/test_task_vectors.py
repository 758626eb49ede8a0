import re
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import GPT2Config, GPT2ForSequenceClassification, GPT2Model

from pave_lightning.errors import PaveError
from pave_lightning.weights import (
    Architecture,
    Checkpoint,
    ExpertTaskVectors,
    Parameter,
    ParameterKind,
    task_vectors,
)
from pave_lightning.weights.task_vectors import PlannedTaskVectors, absent_children, differences


def changed(folder, target, change):
    """A copy of a model folder whose stored tensors went through ``change``."""
    shutil.copytree(folder, target)
    tensors = load_file(target / "model.safetensors")
    change(tensors)
    save_file({name: value.contiguous() for name, value in tensors.items()}, target / "model.safetensors")
    return target


def references(expert_folders, **others):
    return {name: str(folder) for name, folder in {**expert_folders, **others}.items()}


def test_vectors_are_expert_minus_base(base_folder, expert_folders):
    source = task_vectors(str(base_folder), references(expert_folders))
    assert source.tasks == ("first", "second", "third")
    base = load_file(base_folder / "model.safetensors")
    assert {parameter.name for parameter in source.parameters} == set(base)
    for task, folder in expert_folders.items():
        expert = load_file(folder / "model.safetensors")
        for parameter in source.parameters:
            stored = expert[f"bert.{parameter.name}"]
            assert torch.equal(source.base(parameter), base[parameter.name])
            assert torch.equal(source.expert(task, parameter), stored)
            assert torch.equal(source.vector(task, parameter), stored - base[parameter.name])


def test_kinds_come_with_the_parameters(base_folder, expert_folders):
    source = task_vectors(str(base_folder), references(expert_folders))
    kinds = {parameter.name: parameter for parameter in source.parameters}
    assert kinds["encoder.layer.0.output.dense.weight"].kind == ParameterKind.LINEAR
    assert kinds["encoder.layer.0.output.dense.weight"].input_axis == 1
    assert sum(parameter.kind == ParameterKind.LINEAR for parameter in source.parameters) == 2 * 6 + 1


@pytest.mark.parametrize("elements", [1, 31, 32, 33, 100, 1600, 3199])
def test_blocks_cover_every_row_once(base_folder, expert_folders, elements):
    source = task_vectors(str(base_folder), references(expert_folders))
    parameter = next(p for p in source.parameters if p.name == "embeddings.word_embeddings.weight")
    blocks = list(source.blocks(parameter, elements))
    parts = [source.vector("second", parameter, rows) for rows in blocks]
    assert torch.equal(torch.cat(parts), source.vector("second", parameter))
    assert all(len(part) == 1 or part.numel() <= elements for part in parts)
    assert len(parts) > 1


def test_small_parameters_and_scalars_are_one_block(base_folder, expert_folders):
    source = task_vectors(str(base_folder), references(expert_folders))
    parameter = source.parameters[0]
    assert list(source.blocks(parameter, parameter.elements)) == [None]
    assert list(source.blocks(Parameter("scale", ParameterKind.OTHER, ()), 0)) == [None]


def test_half_precision_experts_are_read_as_float32(base_folder, expert_folders, tmp_path):
    def halve(tensors):
        tensors.update({name: value.half() for name, value in tensors.items()})

    half = changed(expert_folders["first"], tmp_path / "half", halve)
    source = task_vectors(str(base_folder), {"a": str(half)})
    parameter = source.parameters[0]
    assert source.expert("a", parameter).dtype == torch.float32
    stored = load_file(half / "model.safetensors")[f"bert.{parameter.name}"]
    assert torch.equal(source.expert("a", parameter), stored.float())


def test_no_experts(base_folder):
    with pytest.raises(PaveError, match="no experts are given"):
        task_vectors(str(base_folder), {})


def test_weights_that_are_not_finite_are_named_when_they_are_read(base_folder, expert_folders, tmp_path):
    name = "encoder.layer.1.output.dense.bias"

    def poison(tensors):
        tensors[f"bert.{name}"][3] = float("nan")

    bad = changed(expert_folders["first"], tmp_path / "poisoned", poison)
    source = task_vectors(str(base_folder), {"good": str(expert_folders["second"]), "bad": str(bad)})
    parameter = next(p for p in source.parameters if p.name == name)
    source.expert("good", parameter)
    with pytest.raises(PaveError, match=rf"poisoned: the weight {re.escape(name)} holds NaN"):
        source.vector("bad", parameter)


def test_all_differences_of_all_experts_are_told_at_once(base_folder, expert_folders, tmp_path):
    def rename(tensors):
        tensors["bert.encoder.layer.0.renamed.weight"] = tensors.pop("bert.encoder.layer.0.output.dense.weight")

    def widen(tensors):
        tensors["bert.embeddings.position_embeddings.weight"] = torch.zeros(33, 32)

    renamed = changed(expert_folders["first"], tmp_path / "renamed", rename)
    widened = changed(expert_folders["second"], tmp_path / "widened", widen)
    with pytest.raises(PaveError) as caught:
        task_vectors(str(base_folder), references(expert_folders, renamed=renamed, widened=widened))
    assert str(caught.value).splitlines() == [
        "the experts do not fit the base:",
        "  - task 'renamed': encoder.layer.0.output.dense.weight [32, 64] is in the base, but not in the expert",
        "  - task 'renamed': the expert's files hold 1 weight that no module of a BertModel has "
        "(encoder.layer.0.renamed.weight), and the base lacks; if config.json is right, load the model with "
        "transformers, which passes over them, and save it again",
        "  - task 'widened': embeddings.position_embeddings.weight is [33, 32] in the expert, [32, 32] in the base",
    ]


def test_beyond_twenty_differences_are_counted(base_folder, make_base, make_expert):
    wide = make_expert(make_base(hidden_size=48))
    # Every tensor of the backbone differs in shape, but the inner biases.
    different = len(Checkpoint(base_folder, "bert").backbone) - 2
    with pytest.raises(PaveError) as caught:
        task_vectors(str(base_folder), {"wide": str(wide)})
    lines = str(caught.value).splitlines()
    assert len(lines) == 1 + 20 + 1
    assert lines[-1] == f"  ... and {different - 20} more"


def test_an_expert_with_more_layers(base_folder, make_base, make_expert):
    deep = make_expert(make_base(num_hidden_layers=3))
    base, expert = Checkpoint(base_folder, "bert"), Checkpoint(deep, "bert")
    architecture = Architecture.of_folder(base_folder)
    found = differences("deep", base, expert, architecture)
    (told,) = found  # the base's configuration knows none of them
    assert told.startswith("task 'deep': the expert's files hold 16 weights that no module of a BertModel has (encoder")
    (told,) = differences("shallow", expert, base, architecture)
    assert told.startswith("base: its files hold 16 weights that no module of a BertModel has (encoder.layer.2.")
    assert told == differences("again", expert, base, architecture)[0]
    found = differences("deep", base, expert, Architecture.of_folder(deep))
    assert len(found) == 16
    assert all("encoder.layer.2." in line and "in the expert, but not in the base" in line for line in found)


def test_experts_that_fit_differ_in_nothing(base_folder, expert_folders):
    base = Checkpoint(base_folder, "bert")
    expert = Checkpoint(expert_folders["first"], "bert")
    assert differences("first", base, expert, Architecture.of_folder(base_folder)) == []


def test_a_child_that_the_base_lacks_belongs_to_the_head(make_base, make_expert):
    base_folder = make_base(pooler=False)
    base, expert = Checkpoint(base_folder, "bert"), Checkpoint(make_expert(base_folder), "bert")
    assert absent_children(base, expert) == {"pooler"}
    architecture = Architecture.of_folder(base_folder)
    assert differences("a", base, expert, architecture) == []
    source = ExpertTaskVectors(base, {"a": expert}, architecture)
    assert not any(parameter.name.startswith("pooler") for parameter in source.parameters)
    assert len(source.parameters) == len(base.backbone)


def test_a_child_that_the_expert_lacks_stays_out(base_folder, expert_folders, tmp_path):
    def drop(tensors):
        del tensors["bert.pooler.dense.weight"], tensors["bert.pooler.dense.bias"]

    bare = changed(expert_folders["first"], tmp_path / "bare", drop)
    source = task_vectors(str(base_folder), {"bare": str(bare), "second": str(expert_folders["second"])})
    assert not any(parameter.name.startswith("pooler") for parameter in source.parameters)


@pytest.mark.parametrize("in_base", [True, False])
def test_index_buffers_of_older_checkpoints_do_not_matter(base_folder, expert_folders, tmp_path, in_base):
    def add(tensors):
        prefix = "" if in_base else "bert."
        tensors[f"{prefix}embeddings.position_ids"] = torch.arange(32).reshape(1, -1)

    old = changed(base_folder if in_base else expert_folders["first"], tmp_path / "old", add)
    base, expert = (old, expert_folders["first"]) if in_base else (base_folder, old)
    source = task_vectors(str(base), {"a": str(expert)})
    assert not any("position_ids" in parameter.name for parameter in source.parameters)
    assert len(source.parameters) == len(Checkpoint(base_folder, "bert").backbone)


@pytest.mark.parametrize("in_base", [True, False])
def test_causal_masks_in_old_gpt2_files_do_not_matter(tmp_path, in_base):
    config = GPT2Config(n_embd=8, n_layer=1, n_head=2, vocab_size=20, n_positions=8, eos_token_id=0, bos_token_id=0)
    GPT2Model(config).save_pretrained(tmp_path / "base")
    GPT2ForSequenceClassification(config).save_pretrained(tmp_path / "expert")

    def add(tensors):
        tensors["h.0.attn.bias" if in_base else "transformer.h.0.attn.bias"] = torch.ones(1, 1, 8, 8).tril()

    kind = "base" if in_base else "expert"
    folders = {"base": tmp_path / "base", "expert": tmp_path / "expert"}
    folders[kind] = changed(folders[kind], tmp_path / "old", add)
    source = task_vectors(str(folders["base"]), {"a": str(folders["expert"])})
    names = {parameter.name for parameter in source.parameters}
    assert "h.0.attn.c_attn.bias" in names
    assert "h.0.attn.bias" not in names


def test_planned_vectors_have_shapes_but_no_values():
    kernel = Parameter("patches.weight", ParameterKind.CONVOLUTION, (6, 3, 2, 2), 1)
    turned = Parameter("mlp.weight", ParameterKind.LINEAR, (8, 5), 0)
    bias = Parameter("mlp.bias", ParameterKind.BIAS, (5,))
    planned = PlannedTaskVectors([kernel, turned, bias], {"one": {"patches": 3, "mlp": 2}, "two": "it has none"})
    assert planned.tasks == ("one", "two")
    assert planned.parameters == (kernel, turned, bias)
    assert [planned.without_factors(task) for task in planned.tasks] == [None, "it has none"]
    shapes = [[tuple(part.shape) for part in planned.factors("one", parameter)] for parameter in (kernel, turned)]
    assert shapes == [[(6, 3), (3, 12)], [(5, 2), (2, 8)]]
    assert planned.factors("one", bias) is None
    assert planned.factors("two", turned) is None
    for ask in (planned.base, lambda parameter: planned.vector("one", parameter), planned.read):
        with pytest.raises(NotImplementedError, match=r"mlp\.weight: only names and shapes are known"):
            ask(turned)
    with pytest.raises(RuntimeError, match="meta"):
        bool(planned.factors("one", turned)[0].any())


def test_a_walk_gives_every_task_vector_and_reads_the_base_once(base_folder, expert_folders, monkeypatch):
    source = task_vectors(str(base_folder), references(expert_folders))
    asked = []
    base = source.base
    monkeypatch.setattr(source, "base", lambda parameter, rows=None: asked.append(rows) or base(parameter, rows))
    monkeypatch.setattr(source, "blocks", lambda parameter: iter([slice(0, 1), slice(1, parameter.shape[0])]))
    chosen = source.parameters[:3]
    walked = list(source.walk(chosen))
    assert len(asked) == len(walked) == 2 * len(chosen)
    assert [parameter for parameter, _, _ in walked] == [parameter for parameter in chosen for _ in range(2)]
    for parameter, rows, own in walked:
        assert tuple(own) == source.tasks
        assert all(torch.equal(own[task], source.vector(task, parameter, rows)) for task in source.tasks)
    assert {parameter for parameter, _, _ in source.walk()} == set(source.parameters)


def test_a_parameter_that_a_task_leaves_alone(base_folder, expert_folders, tmp_path):
    name = "embeddings.word_embeddings.weight"
    original = load_file(base_folder / "model.safetensors")[name]
    same = changed(
        expert_folders["first"], tmp_path / "same", lambda tensors: tensors.update({f"bert.{name}": original})
    )
    source = task_vectors(str(base_folder), references(expert_folders, same=same))
    parameter = next(p for p in source.parameters if p.name == name)
    assert source.is_zero("same", parameter)
    assert not source.is_zero("first", parameter)


def bare_and_headed(kind, folder):
    """A tiny model without a head, the same with one for tokens, and with one for classes: their folders."""
    import transformers

    sizes = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "vocab_size": 50, "pad_token_id": 0}
    config = getattr(transformers, f"{kind}Config")(**sizes)
    heads = ("Model", "ForMaskedLM" if kind == "Bert" else "ForCausalLM", "ForSequenceClassification")
    for seed, head in enumerate(heads):
        torch.manual_seed(seed)
        getattr(transformers, f"{kind}{head}")(config).save_pretrained(folder / head)
    return [folder / head for head in heads]


@pytest.mark.parametrize("kind", ["Bert", "Llama"])
def test_bare_models_and_models_with_heads_are_compared(kind, tmp_path):
    from transformers import AutoModel

    places = bare_and_headed(kind, tmp_path)
    models = [AutoModel.from_pretrained(place).state_dict() for place in places]
    name = "encoder.layer.0.output.dense.weight" if kind == "Bert" else "layers.0.mlp.down_proj.weight"
    for base, first in zip(places, models, strict=True):
        for expert, second in zip(places, models, strict=True):
            source = task_vectors(str(base), {"a": str(expert)})
            parameter = next(found for found in source.parameters if found.name.endswith(name))
            assert torch.equal(source.vector("a", parameter), second[name] - first[name])


def test_checkpoints_of_several_types_and_shards(base_folder, expert_folders, tmp_path):
    from transformers import AutoModel, AutoModelForSequenceClassification

    base = AutoModel.from_pretrained(base_folder).bfloat16()
    base.save_pretrained(tmp_path / "base", max_shard_size="20kB")
    experts = {}
    for task, dtype in (("first", torch.float16), ("second", torch.float32)):
        experts[task] = AutoModelForSequenceClassification.from_pretrained(expert_folders[task]).to(dtype)
        experts[task].save_pretrained(tmp_path / task, max_shard_size="30kB")
    assert len(list((tmp_path / "base").glob("model-*"))) > 1
    source = task_vectors(str(tmp_path / "base"), {task: str(tmp_path / task) for task in experts})
    for parameter in source.parameters:
        for task, expert in experts.items():
            expected = expert.bert.get_parameter(parameter.name).float() - base.get_parameter(parameter.name).float()
            assert torch.equal(source.vector(task, parameter), expected)
