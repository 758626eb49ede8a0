"""Task vectors of modules in memory."""

from copy import deepcopy

import pytest
import torch
from torch import nn
from transformers import BertConfig, BertForSequenceClassification, BertModel, CLIPConfig, CLIPForImageClassification

from pave_lightning import PaveError, merge, task_vectors
from pave_lightning.weights import ModuleTaskVectors, ParameterKind

BERT = {
    "hidden_size": 16,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "intermediate_size": 24,
    "vocab_size": 30,
    "pad_token_id": 0,
}


class Net(nn.Module):
    def __init__(self, classes=3):
        super().__init__()
        self.words = nn.Embedding(9, 6)
        self.body = nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, 6))
        self.position = nn.Parameter(torch.randn(1, 6))
        self.register_buffer("table", torch.arange(6.0))
        self.head = nn.Linear(6, classes)

    def forward(self, words):
        return self.head(self.body(self.words(words) + self.position))


def noisy(module, seed):
    random = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=random))
    return module


@pytest.fixture
def base():
    torch.manual_seed(0)
    return Net()


@pytest.fixture
def experts(base):
    made = {}
    for seed, (task, classes) in enumerate((("one", 2), ("two", 5)), 1):
        expert = noisy(deepcopy(base), seed)
        expert.head = nn.Linear(6, classes)
        expert.body[1].running_mean.add_(seed)
        made[task] = expert
    return made


def problems_of(*arguments, **options):
    with pytest.raises(PaveError) as caught:
        task_vectors(*arguments, **options)
    headline, *lines = str(caught.value).splitlines()
    assert headline == "the experts do not fit the base:"
    return [line.removeprefix("  - ") for line in lines]


def test_parameters_have_the_names_and_kinds_of_their_modules(base, experts):
    found = task_vectors(base, experts, heads=["head"])
    assert isinstance(found, ModuleTaskVectors)
    assert {parameter.name: parameter.kind for parameter in found.parameters} == {
        "position": ParameterKind.OTHER,
        "words.weight": ParameterKind.EMBEDDING,
        "body.0.weight": ParameterKind.LINEAR,
        "body.0.bias": ParameterKind.BIAS,
        "body.1.weight": ParameterKind.NORM_SCALE,
        "body.1.bias": ParameterKind.NORM_SHIFT,
        "body.3.weight": ParameterKind.LINEAR,
        "body.3.bias": ParameterKind.BIAS,
    }
    for parameter in found.parameters:
        expected = experts["two"].get_parameter(parameter.name) - base.get_parameter(parameter.name)
        assert torch.equal(found.vector("two", parameter), expected)
        assert torch.equal(found.vector("two", parameter, slice(0, 1)), expected[:1])


def test_what_is_read_is_nobody_elses(base, experts):
    found, before = task_vectors(base, experts, heads=["head"]), base.position.detach().clone()
    found.base(found.parameters[0]).zero_()
    assert torch.equal(base.position, before)


def test_a_merged_module_is_base_plus_scaled_sum_with_the_head_of_a_task(base, experts):
    merged = merge("task_arithmetic", task_vectors(base, experts, heads=["head"]))
    for task in ("one", "two", None):
        model = merged.model(task, scale=0.25)
        state, started = model.state_dict(), base.state_dict()
        for name, value in state.items():
            if name.startswith("head."):
                assert torch.equal(value, (base if task is None else experts[task]).state_dict()[name])
            elif "running_mean" in name:
                assert torch.equal(value, started[name] + 1.5)
            elif value.is_floating_point():
                own = [expert.state_dict()[name] - started[name] for expert in experts.values()]
                torch.testing.assert_close(value, started[name] + 0.25 * sum(own))
        assert not model.training
    assert base.training  # nothing of it was changed


def test_the_scale_is_the_methods_own_where_none_is_given(base, experts):
    merged = merge("task_arithmetic", task_vectors(base, experts, heads=["head"]))
    plain, scaled = merged.model(), merged.model(scale=merged.default_scale)
    assert merged.default_scale not in (0.0, 1.0)
    assert all(torch.equal(a, b) for a, b in zip(plain.parameters(), scaled.parameters(), strict=True))


def test_methods_that_keep_something_for_each_task_ask_for_it(base, experts):
    merged = merge("emr", task_vectors(base, experts, heads=["head"]))
    with pytest.raises(PaveError, match="keeps weights for each task; name one of one, two"):
        merged.model()
    model = merged.model("two")
    expected = base.body[0].weight + merged.own("two", "body.0.weight")
    assert torch.equal(model.body[0].weight, expected)
    with pytest.raises(PaveError, match="no task 'three'"):
        merged.model("three")


def test_dtypes_stay(base, experts):
    half = {task: expert.bfloat16() for task, expert in experts.items()}
    model = merge("average", task_vectors(base.bfloat16(), half, heads=["head"])).model("one")
    assert {value.dtype for value in model.parameters()} == {torch.bfloat16}
    expected = sum(expert.body[0].weight.float() for expert in half.values()) / 2
    torch.testing.assert_close(model.body[0].weight.float(), expected, atol=1e-2, rtol=1e-2)


def test_experts_may_be_state_dicts(base, experts):
    experts["two"].head = deepcopy(base.head)
    states = {task: expert.state_dict() for task, expert in experts.items()}
    merged = merge("average", task_vectors(base, states, heads=["head"]))
    whole = merge("average", task_vectors(base, experts, heads=["head"]))
    found, expected = merged.model("two").state_dict(), whole.model("two").state_dict()
    assert all(torch.equal(found[name], value) for name, value in expected.items())
    with pytest.raises(PaveError, match=r"'one' is a state dict, .*no place for its head\.weight.*module"):
        merged.model("one")


def test_compiled_experts_are_what_they_wrap(base, experts):
    wrapped = {task: torch.compile(expert) for task, expert in experts.items()}
    found = task_vectors(base, wrapped, heads=["head"])
    assert type(merge("average", found).model("one")) is Net


def test_models_of_transformers_tell_their_heads():
    torch.manual_seed(0)
    base = BertModel(BertConfig(**BERT))
    experts = {
        task: BertForSequenceClassification(BertConfig(**BERT, num_labels=n)) for task, n in (("a", 2), ("b", 4))
    }
    for seed, expert in enumerate(experts.values()):
        expert.bert = noisy(deepcopy(base), seed)
    found = task_vectors(base, experts)
    assert [parameter.name for parameter in found.parameters] == [name for name, _ in base.named_parameters()]
    model = merge("average", found).model("b")
    assert torch.equal(model.classifier.weight, experts["b"].classifier.weight)
    expected = sum(expert.bert.pooler.dense.weight for expert in experts.values()) / 2
    torch.testing.assert_close(model.bert.pooler.dense.weight, expected)
    assert type(merge("average", found).model()) is BertModel


def test_heads_beside_the_backbone_are_told_too():
    vision = {
        key: BERT[key] for key in ("hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size")
    }
    config = CLIPConfig(vision_config={**vision, "image_size": 8, "patch_size": 4}, text_config=BERT, num_labels=3)
    base = CLIPForImageClassification(config)
    found = task_vectors(base, {task: noisy(deepcopy(base), seed) for seed, task in enumerate("ab")})
    assert all(parameter.name.startswith("vision_model.") for parameter in found.parameters)


def test_everything_that_does_not_fit_is_told_at_once(base, experts):
    experts["two"].body[0] = nn.Linear(6, 7)
    experts["two"].body[3] = nn.Linear(7, 6)
    experts["two"].register_parameter("more", nn.Parameter(torch.ones(2)))
    experts["two"].table += 1
    del experts["one"].position
    assert problems_of(base, experts, heads=["heads"]) == [
        "heads: no submodule or parameter is named 'heads'; did you mean 'head'?",
        "task 'one': position [1, 6] is in the base, but not in the expert",
        "task 'one': head.weight is [2, 6] in the expert, [3, 6] in the base",
        "task 'one': head.bias is [2] in the expert, [3] in the base",
        "task 'one': where that is what the task keeps for itself, name it: heads=['head']",
        "task 'two': body.0.weight is [7, 6] in the expert, [8, 6] in the base",
        "task 'two': body.0.bias is [7] in the expert, [8] in the base",
        "task 'two': body.3.weight is [6, 7] in the expert, [6, 8] in the base",
        "task 'two': head.weight is [5, 6] in the expert, [3, 6] in the base",
        "task 'two': head.bias is [5] in the expert, [3] in the base",
        "task 'two': more [2] is in the expert, but not in the base",
        "task 'two': where that is what the task keeps for itself, name it: heads=['body.0', 'body.3', 'head', 'more']",
        "task 'two': the buffer table differs from the base's; buffers are not merged, so base and experts must have "
        "the same",
    ]


def test_an_expert_that_is_the_base(base):
    (problem,) = problems_of(base, {"one": base})
    assert problem == "task 'one': the expert is the base itself; copy the base before it is trained (copy.deepcopy)"


def test_weights_that_are_tied_in_one_of_two(base):
    tied = nn.ModuleDict({"a": nn.Linear(3, 3), "b": nn.Linear(3, 3)})
    tied["b"].weight = tied["a"].weight
    apart = nn.ModuleDict({"a": nn.Linear(3, 3), "b": nn.Linear(3, 3)})
    assert problems_of(tied, {"one": apart}) == [
        "task 'one': a.weight and b.weight are one tensor in the base, and two in the expert"
    ]
    assert problems_of(apart, {"one": tied}) == [
        "task 'one': a.weight and b.weight are one tensor in the expert, and two in the base"
    ]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (lambda net: (net, {}), "no experts are given"),
        (lambda net: (net, {"one": "some/folder"}), "expert of 'one': expected a module, found str"),
        (
            lambda net: ("some/folder", {"one": net}),
            "expected folders or hub ids, found Net; .* the base must be a module",
        ),
        (lambda net: (net.state_dict(), {"one": net}), "found OrderedDict; .* the base must be a module"),
        (lambda net: (net, {"one": deepcopy(net).to("meta")}), r"expert of 'one': \d+ weights have no values"),
    ],
)
def test_what_cannot_be_compared_is_refused(base, arguments, message):
    with pytest.raises(PaveError, match=message):
        task_vectors(*arguments(base))


def test_heads_of_folders_are_not_named(base_folder, expert_folders):
    with pytest.raises(PaveError, match="heads are named for modules in memory alone"):
        task_vectors(str(base_folder), {"a": str(expert_folders["first"])}, heads=["classifier"])


def test_adapters_are_merged_first(base):
    from peft import LoraConfig, get_peft_model

    adapted = get_peft_model(deepcopy(base), LoraConfig(target_modules=["body.0"]))
    with pytest.raises(PaveError, match=r"adapters are not merged .* model\.merge_and_unload\(\)"):
        task_vectors(base, {"one": adapted})
    assert task_vectors(base, {"one": adapted.merge_and_unload()}).tasks == ("one",)


def test_weights_that_are_not_finite_are_refused_when_they_are_read(base, experts):
    with torch.no_grad():
        experts["two"].body[0].weight[0, 0] = torch.nan
    with pytest.raises(PaveError, match=r"expert of 'two': the weight body\.0\.weight holds NaN"):
        merge("average", task_vectors(base, experts, heads=["head"]))


def test_folders_make_no_module(base_folder, expert_folders):
    source = task_vectors(str(base_folder), {task: str(expert_folders[task]) for task in ("first", "second")})
    with pytest.raises(PaveError, match="load_merged"):
        merge("average", source).model("first")
