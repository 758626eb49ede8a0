import json
import shutil

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModel, AutoModelForSequenceClassification, AutoTokenizer

from pave_lightning.errors import PaveError
from pave_lightning.merging import merge
from pave_lightning.merging.folders import MergeContext, load_merged, write_merged
from pave_lightning.merging.methods.average import Average
from pave_lightning.merging.methods.emr import Emr
from pave_lightning.merging.methods.task_arithmetic import TaskArithmetic
from pave_lightning.merging.methods.ties import Ties
from pave_lightning.merging.methods.tsv import TsvCompress
from pave_lightning.weights import Architecture, Checkpoint, ExpertTaskVectors, task_vectors

INPUTS = {
    "input_ids": torch.tensor([[2, 5, 40, 99, 3], [2, 17, 3, 0, 0]]),
    "attention_mask": torch.tensor([[1, 1, 1, 1, 1], [1, 1, 1, 0, 0]]),
}


@pytest.fixture
def write(tmp_path, context_of, base_folder, expert_folders):
    def build(method, scale=None, *, base=base_folder, experts=expert_folders, merged=None, writing=None, **facts):
        source, context = context_of(base, experts, **facts)
        folder = tmp_path / "merged"
        folder.mkdir()
        write_merged(folder, method, source, scale, context, merged=merged, **(writing or {}))
        return folder

    return build


def state(folder, prefix=""):
    tensors = load_file(folder / "model.safetensors")
    return {n.removeprefix(prefix): value.double().numpy() for n, value in tensors.items() if n.startswith(prefix)}


def by_hand(base_folder, expert_folders, reference):
    """Each task's merged backbone in float64: ``method`` maps a list of task vectors to the list of tasks' vectors."""
    base = state(base_folder)
    experts = {task: state(folder, "bert.") for task, folder in expert_folders.items()}
    vectors = {task: {name: own[name] - base[name] for name in base} for task, own in experts.items()}
    merged = reference(vectors)
    return {task: {name: base[name] + merged[task][name] for name in base} for task in experts}


def summed(scale):
    def reference(vectors):
        total = {name: scale * sum(own[name] for own in vectors.values()) for name in next(iter(vectors.values()))}
        return dict.fromkeys(vectors, total)

    return reference


def elected(vectors):
    names = list(next(iter(vectors.values())))
    masks, unified = {task: {} for task in vectors}, {}
    for name in names:
        stacked = np.stack([own[name] for own in vectors.values()])
        sign = np.where(stacked.sum(0) > 0, 1.0, -1.0)
        agrees = stacked * sign > 0
        unified[name] = sign * np.where(agrees, abs(stacked), 0).max(0)
        for task, mask in zip(vectors, agrees, strict=True):
            masks[task][name] = mask
    result = {}
    for task, own in vectors.items():
        factor = sum(abs(own[n]).sum() for n in names) / sum(abs(unified[n][masks[task][n]]).sum() for n in names)
        result[task] = {name: factor * masks[task][name] * unified[name] for name in names}
    return result


def compressed(vectors):
    """Each task's own vector, every matrix and table cut to a third of its singular directions, at least one."""
    result = {}
    for task, own in vectors.items():
        result[task] = dict(own)
        for name, value in own.items():
            if value.ndim == 2:
                left, values, right = np.linalg.svd(value, full_matrices=False)
                kept = max(1, len(values) // 3)
                result[task][name] = left[:, :kept] * values[:kept] @ right[:kept]
    return result


@torch.no_grad()
def logits_by_hand(expert_folder, backbone):
    """The expert's model with another backbone."""
    model = AutoModelForSequenceClassification.from_pretrained(expert_folder).eval()
    own = model.bert.state_dict()
    model.bert.load_state_dict({**own, **{name: torch.tensor(value).float() for name, value in backbone.items()}})
    return model(**INPUTS).logits


@pytest.mark.parametrize(
    "case",
    [
        (Average(), None, summed(1 / 3)),
        (TaskArithmetic(), 0.3, summed(0.3)),
        (TaskArithmetic(), -0.5, summed(-0.5)),
        (Emr(), None, elected),
        (TsvCompress(), None, compressed),
    ],
    ids=["average", "task arithmetic", "negated", "emr", "tsv_c"],
)
def test_a_merged_model_answers_as_one_merged_by_hand(write, base_folder, expert_folders, case):
    method, scale, reference = case
    folder = write(method, scale)
    expected = by_hand(base_folder, expert_folders, reference)
    for task, expert in expert_folders.items():
        model = load_merged(folder, task)
        assert not model.training
        with torch.no_grad():
            found = model(**INPUTS).logits
        wanted = logits_by_hand(expert, expected[task])
        assert found.shape == wanted.shape
        assert torch.allclose(found, wanted, atol=1e-5)
        # The test can tell: the expert itself answers otherwise.
        assert not torch.allclose(found, logits_by_hand(expert, state(expert, "bert.")), atol=1e-3)


def test_transformers_loads_backbone_tokenizer_and_heads(write, base_folder, expert_folders):
    folder = write(TaskArithmetic(), 0.3)
    model, info = AutoModel.from_pretrained(folder, output_loading_info=True)
    assert type(model).__name__ == "BertModel"
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    expected = by_hand(base_folder, expert_folders, summed(0.3))["first"]
    for name, value in model.named_parameters():
        assert value.dtype == torch.float32
        assert torch.allclose(value, torch.tensor(expected[name]).float(), atol=1e-6)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    assert (
        tokenizer("w1 w2", "w3")["input_ids"] == AutoTokenizer.from_pretrained(base_folder)("w1 w2", "w3")["input_ids"]
    )
    assert json.loads((folder / "config.json").read_text())["architectures"] == ["BertModel"]
    heads = {task: load_file(folder / "heads" / task / "head.safetensors") for task in expert_folders}
    for task, head in heads.items():
        stored = load_file(expert_folders[task] / "model.safetensors")
        assert sorted(head) == ["classifier.bias", "classifier.weight"]
        assert all(torch.equal(value, stored[name]) for name, value in head.items())
    assert json.loads((folder / "heads" / "second" / "config.json").read_text())["id2label"].keys() == {"0", "1", "2"}


def test_what_the_folder_says_of_itself(write, base_folder):
    facts = json.loads((write(Ties(), 1.0, vectors="purified", seeds=[1, 2]) / "pave.json").read_text())
    assert facts == {
        "method": "ties",
        "form": "static",
        "base": str(base_folder),
        "vectors": "purified",
        "seeds": [1, 2],
    }


@pytest.mark.parametrize("method", [Emr(), TsvCompress()], ids=lambda method: method.name)
def test_per_task_folders_say_so_and_hold_what_tasks_keep(write, expert_folders, method):
    folder = write(method)
    assert json.loads((folder / "pave.json").read_text())["form"] == "per-task"
    assert sorted(file.stem for file in (folder / "modulators").iterdir()) == sorted(expert_folders)


def test_the_scale_zero_gives_the_base_bit_for_bit(write, base_folder):
    merged = load_file(write(TaskArithmetic(), 0.0) / "model.safetensors")
    base = load_file(base_folder / "model.safetensors")
    assert merged.keys() == base.keys()
    assert all(torch.equal(merged[name], value) for name, value in base.items())


@pytest.mark.parametrize("method", [TaskArithmetic(), Emr(), TsvCompress()], ids=lambda method: method.name)
def test_blocks_and_shards_change_nothing(write, method, monkeypatch, tmp_path):
    scale = 0.3 if method.default_scale else None
    whole = write(method, scale).rename(tmp_path / "whole")
    monkeypatch.setattr(ExpertTaskVectors.blocks, "__defaults__", (100,))
    folder = write(method, scale, writing={"max_shard_size": "10KB"})
    assert not (folder / "model.safetensors").exists()
    first, second = Checkpoint(whole, "bert"), Checkpoint(folder, "bert")
    assert sorted(first) == sorted(second)
    assert all(torch.equal(first.tensor(name), second.tensor(name)) for name in first)
    loaded = AutoModel.from_pretrained(folder).state_dict()
    assert all(torch.equal(loaded[name], first.tensor(name)) for name in first)
    models = [load_merged(path, "second").state_dict() for path in (whole, folder)]
    assert all(torch.allclose(value, models[1][name], atol=1e-6) for name, value in models[0].items())


@pytest.mark.parametrize(
    "method", [Average(), TaskArithmetic(), Ties(), Emr(), TsvCompress()], ids=lambda method: method.name
)
def test_experts_that_equal_the_base_give_the_base_bit_for_bit(write, base_folder, make_expert, method):
    same = {task: make_expert(base_folder, size=0.0) for task in "ab"}
    folder = write(method, 1.0 if method.default_scale else None, experts=same)
    base = load_file(base_folder / "model.safetensors")
    for task in same:
        for name, value in load_merged(folder, task).bert.named_parameters():
            assert torch.equal(value, base[name])


def test_vectors_that_are_known_already_are_not_merged_again(write, context_of, base_folder, expert_folders):
    source, _ = context_of(base_folder, expert_folders)
    known = {parameter.name: torch.ones(parameter.shape) for parameter in source.parameters}
    merged = load_file(write(TaskArithmetic(), 0.5, merged=known) / "model.safetensors")
    base = load_file(base_folder / "model.safetensors")
    assert all(torch.equal(merged[name], value + 0.5) for name, value in base.items())
    again = merge(TaskArithmetic(), source).vectors
    assert not torch.equal(again["pooler.dense.bias"], known["pooler.dense.bias"])


@pytest.mark.parametrize("method", [Average(), Emr()], ids=lambda method: method.name)
def test_a_pooler_that_the_base_lacks_stays_with_each_task(write, make_base, make_expert, method):
    base = make_base(pooler=False)
    experts = {"a": make_expert(base, seed=1), "b": make_expert(base, seed=2)}
    folder = write(method, base=base, experts=experts)
    assert not any("pooler" in name for name in load_file(folder / "model.safetensors"))
    for task, expert in experts.items():
        stored = load_file(expert / "model.safetensors")
        pooler = load_merged(folder, task).bert.pooler.dense
        assert torch.equal(pooler.weight, stored["bert.pooler.dense.weight"])
        assert torch.equal(pooler.bias, stored["bert.pooler.dense.bias"])


@pytest.mark.parametrize("broken", [float("nan"), float("inf")])
def test_a_merge_that_is_not_finite_is_refused_by_name(write, broken, monkeypatch):
    def merge(self, parameter, base, vectors):
        made = torch.zeros_like(base)
        if parameter.name == "pooler.dense.weight":
            made[0, 0] = broken
        return made

    monkeypatch.setattr(TaskArithmetic, "merge", merge)
    with pytest.raises(PaveError, match=r"'task_arithmetic' makes NaN or infinity of pooler.dense.weight"):
        write(TaskArithmetic(), 0.3)


def test_a_scale_that_overflows_is_refused(write):
    with pytest.raises(PaveError, match="try a smaller scale"):
        write(TaskArithmetic(), 1e300)


def test_what_a_task_keeps_must_be_finite(write, monkeypatch):
    monkeypatch.setattr(Emr, "rescalers", lambda self: {"first": 1.0, "second": float("nan")})
    with pytest.raises(PaveError, match="'emr' makes NaN or infinity of the factor of task 'second'"):
        write(Emr())


def test_what_no_expert_shares_is_taken_from_the_base(write, base_folder, expert_folders, tmp_path):
    bare = {}
    for task, folder in expert_folders.items():
        bare[task] = tmp_path / task
        shutil.copytree(folder, bare[task])
        tensors = {n: v for n, v in load_file(folder / "model.safetensors").items() if "pooler" not in n}
        save_file(tensors, bare[task] / "model.safetensors")
    merged = load_file(write(Average(), experts=bare) / "model.safetensors")
    base = load_file(base_folder / "model.safetensors")
    assert torch.equal(merged["pooler.dense.weight"], base["pooler.dense.weight"])


def test_another_place_of_the_base_can_be_given(write, base_folder, tmp_path):
    moved = tmp_path / "moved"
    shutil.copytree(base_folder, moved)
    folder = write(Emr(), base=moved)
    here = load_merged(folder, "first").state_dict()
    moved.rename(tmp_path / "elsewhere")
    with pytest.raises(PaveError, match="base: there is no folder"):
        load_merged(folder, "first")
    there = load_merged(folder, "first", base=str(tmp_path / "elsewhere")).state_dict()
    assert all(torch.equal(value, there[name]) for name, value in here.items())


def test_a_task_that_is_not_there(write):
    folder = write(Average())
    with pytest.raises(PaveError, match="no head for task 'secnod': did you mean 'second'"):
        load_merged(folder, "secnod")


def test_folders_that_are_no_merged_models(tmp_path, base_folder):
    for folder in (tmp_path, base_folder, tmp_path / "nowhere"):
        with pytest.raises(PaveError, match=r"is no merged model: it has no readable pave\.json"):
            load_merged(folder, "first")


@pytest.mark.parametrize("text", ["[]", "{}", "3", '"merged"'])
def test_a_file_of_the_same_name_that_is_none_of_ours(write, text):
    folder = write(Average())
    (folder / "pave.json").write_text(text)
    with pytest.raises(PaveError, match="is no merged model"):
        load_merged(folder, "first")


def test_a_merged_folder_that_lost_weights(write):
    folder = write(Average())
    tensors = load_file(folder / "model.safetensors")
    lost = [name for name in tensors if name.startswith("encoder.layer.1.output")]
    for name in lost:
        del tensors[name]
    save_file(tensors, folder / "model.safetensors")
    with pytest.raises(PaveError, match=rf"lacks {len(lost)} weights, among them bert\.encoder\.layer\.1\.output"):
        load_merged(folder, "first")


def test_a_head_that_is_broken(write):
    folder = write(Average())
    (folder / "heads" / "first" / "head.safetensors").write_bytes(b"broken")
    with pytest.raises(PaveError, match=r"head\.safetensors is truncated or no safetensors file .*; merge again"):
        load_merged(folder, "first")


@pytest.mark.parametrize("pooler", [True, False])
def test_what_transformers_would_draw_at_random_is_noted(make_base, make_expert, tmp_path, pooler):
    base = make_base(pooler=pooler)
    folders = {task: make_expert(base, seed=seed) for seed, task in enumerate(("a", "b"), 1)}
    source = task_vectors(str(base), {task: str(folder) for task, folder in folders.items()})
    architecture = Architecture.of_folder(folders["a"])
    checkpoints = {task: source.checkpoint(task) for task in source.tasks}
    context = MergeContext(str(base), architecture.checkpoint(base), checkpoints, architecture, {})
    write_merged(tmp_path, Average(), source, None, context)
    facts = json.loads((tmp_path / "pave.json").read_text())
    assert facts.get("not_in_the_base") == (None if pooler else ["pooler"])
    _, info = AutoModel.from_pretrained(tmp_path, output_loading_info=True)
    assert {name.partition(".")[0] for name in info["missing_keys"]} == set(facts.get("not_in_the_base", ()))


# ---- types and files -------------------------------------------------------------------------------------------------


@pytest.fixture
def in_type(tmp_path):
    """A copy of a model folder whose weights, or those that are chosen, are stored in another type."""

    def build(folder, dtype, chosen=lambda name: True):
        target = tmp_path / f"{folder.name}-{str(dtype).removeprefix('torch.')}"
        shutil.copytree(folder, target)
        stored = load_file(folder / "model.safetensors")
        stored = {name: value.to(dtype) if chosen(name) else value for name, value in stored.items()}
        save_file(stored, target / "model.safetensors", {"format": "pt"})
        return target

    return build


def numpy_rounded(values, dtype):
    """float32 values rounded to the nearest of a narrower type, ties to even, as float32; written without torch."""
    values = np.asarray(values, np.float32)
    if dtype == torch.float16:
        return values.astype(np.float16).astype(np.float32)
    if dtype == torch.bfloat16:
        bits = values.view(np.uint32).astype(np.uint64)
        return ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16 << 16).astype(np.uint32).view(np.float32)
    return values


@pytest.mark.parametrize("stored", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("asked", ["base", "float32", "bfloat16", "float16"])
def test_weights_are_written_in_the_type_that_is_asked_for(write, in_type, base_folder, expert_folders, stored, asked):
    base = in_type(base_folder, stored)
    folder = write(TaskArithmetic(), 0.3, base=base, writing={"dtype": asked})
    own = torch.float32 if stored == torch.float64 else stored
    dtype = own if asked == "base" else getattr(torch, asked)
    found = load_file(folder / "model.safetensors")
    assert {value.dtype for value in found.values()} == {dtype}
    start = {name: value.float().numpy() for name, value in load_file(base / "model.safetensors").items()}
    experts = [load_file(path / "model.safetensors") for path in expert_folders.values()]
    for name, value in start.items():
        # Sums as a method takes them: float32, one task after the other.
        total = np.zeros_like(value)
        for expert in experts:
            total = total + (expert[f"bert.{name}"].numpy() - value)
        exact = value + np.float32(0.3) * total
        wanted = numpy_rounded(exact, dtype)
        step = {torch.float32: 2e-7, torch.bfloat16: 8e-3, torch.float16: 1e-3}[dtype]
        # Rounding may fall to either side where the sums differ in their last bit; twice it may not.
        near = np.abs(found[name].float().numpy() - wanted) <= step * np.abs(wanted) + 1e-7
        assert near.all()
        assert (found[name].float().numpy() == wanted).mean() > (0.9 if dtype != torch.float32 else 0)
    assert json.loads((folder / "config.json").read_text())["dtype"] == str(dtype).removeprefix("torch.")
    facts = json.loads((folder / "pave.json").read_text())
    assert facts.get("dtype", "base") == asked
    assert ("rounding" in facts) == (dtype != torch.float32)
    # transformers keeps the type, and both readers have the same weights.
    loaded = AutoModel.from_pretrained(folder)
    assert loaded.dtype == dtype
    ours = load_merged(folder, "first").bert.state_dict()
    assert all(torch.equal(ours[name], value.float()) for name, value in loaded.state_dict().items() if name in ours)


def test_each_weight_keeps_the_type_that_the_base_has_it_in(write, in_type, base_folder):
    base = in_type(base_folder, torch.bfloat16, lambda name: "LayerNorm" not in name)
    found = load_file(write(TaskArithmetic(), 0.3, base=base) / "model.safetensors")
    kept = {name for name, value in found.items() if value.dtype == torch.float32}
    assert kept == {name for name in found if "LayerNorm" in name}


def test_the_type_of_the_experts_does_not_matter(write, in_type, expert_folders):
    experts = {task: in_type(folder, torch.float16) for task, folder in expert_folders.items()}
    found = load_file(write(TaskArithmetic(), 0.3, experts=experts) / "model.safetensors")
    assert {value.dtype for value in found.values()} == {torch.float32}


def test_what_rounding_changes_is_told(write, in_type, base_folder, expert_folders, caplog):
    base = in_type(base_folder, torch.bfloat16)
    with caplog.at_level("INFO", "pave_lightning"):
        folder = write(Average(), base=base)
    start = {name: value.double() for name, value in load_file(base / "model.safetensors").items()}
    experts = [load_file(path / "model.safetensors") for path in expert_folders.values()]
    found = {name: value.double() for name, value in load_file(folder / "model.safetensors").items()}
    lost = size = 0.0
    for name, value in start.items():
        vector = sum(expert[f"bert.{name}"].double() - value for expert in experts) / len(experts)
        lost += float((found[name] - value - vector).square().sum())
        size += float(vector.square().sum())
    told = json.loads((folder / "pave.json").read_text())["rounding"]
    assert told == pytest.approx((lost / size) ** 0.5, rel=1e-3)
    assert f"rounding to bfloat16 changes {told:.2g} of the merged task vector" in caplog.text


def test_rounding_that_takes_most_of_an_update_is_warned_of(write, in_type, base_folder, caplog):
    base = in_type(base_folder, torch.bfloat16)
    write(TaskArithmetic(), 1e-3, base=base)
    assert "write.dtype: float32 keeps it" in caplog.text


@pytest.mark.parametrize("method", [Emr(), TsvCompress()], ids=lambda method: method.name)
def test_per_task_models_are_read_as_they_are_written(write, in_type, base_folder, expert_folders, method):
    base = in_type(base_folder, torch.bfloat16)
    folder = write(method, base=base)
    unified = load_file(folder / "model.safetensors")
    assert {value.dtype for value in unified.values()} == {torch.bfloat16}
    start = {name: value.float() for name, value in load_file(base / "model.safetensors").items()}
    if isinstance(method, TsvCompress):  # nothing is shared, so nothing is rounded
        assert all(torch.equal(unified[name].float(), value) for name, value in start.items())
    model = load_merged(folder, "second", str(base))
    expert = load_file(expert_folders["second"] / "model.safetensors")
    # Far nearer to the expert than the base is, although what is shared has only eight bits.
    name = "encoder.layer.0.attention.self.query.bias"
    own = model.bert.state_dict()[name]
    assert (own - expert[f"bert.{name}"]).norm() < 0.9 * (start[name] - expert[f"bert.{name}"]).norm()


def test_values_that_a_type_cannot_hold_are_refused_by_name(write, expert_folders):
    with pytest.raises(
        PaveError, match=r"the largest that float16 can hold is 6\.55e\+04; write the model in bfloat16"
    ):
        write(TaskArithmetic(), 1e7, writing={"dtype": "float16"})


def test_tensors_of_the_base_that_no_expert_shares_have_the_type_too(write, make_base, make_expert):
    base = make_base()
    bare = make_expert(base, seed=5)
    stored = load_file(bare / "model.safetensors")
    save_file({n: v for n, v in stored.items() if ".pooler." not in n}, bare / "model.safetensors", {"format": "pt"})
    found = load_file(
        write(TaskArithmetic(), 0.3, base=base, experts={"a": bare, "b": bare}, writing={"dtype": "float16"})
        / "model.safetensors"
    )
    assert found["pooler.dense.weight"].dtype == torch.float16
    assert torch.equal(
        found["pooler.dense.weight"], load_file(base / "model.safetensors")["pooler.dense.weight"].half()
    )


def test_a_size_that_is_none_is_refused(write):
    with pytest.raises(ValueError, match="such as 5GB, 500MB or a number of bytes"):
        write(TaskArithmetic(), 0.3, writing={"max_shard_size": "five"})


def test_generation_settings_and_processors_are_carried_along(write, base_folder, tmp_path):
    base = tmp_path / "base"
    shutil.copytree(base_folder, base)
    contents = {
        "generation_config.json": json.dumps({"max_new_tokens": 7}),
        "preprocessor_config.json": json.dumps({"size": 32}),
        "chat_template.jinja": "{{ messages }}",
    }
    for name, text in contents.items():
        (base / name).write_text(text)
    folder = write(TaskArithmetic(), 0.3, base=base)
    assert {name: (folder / name).read_text() for name in contents} == contents
