"""Distillation against Adam written out in float64, on a toy stack of blocks with two heads."""

import logging
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import nn
from torch.func import functional_call

from pave_lightning.errors import PaveError
from pave_lightning.merging import Evidence, merge
from pave_lightning.merging.methods.distillation import Distillation, DistillationOptions, rate_factor


def make(**options):
    return Distillation(DistillationOptions(**options))


def inputs(batch):
    return {name: tensor for name, tensor in batch.items() if name != "labels"}


def centred(logits):
    return logits - logits.mean(dim=1, keepdim=True) if logits.shape[1] > 1 else logits


def unexplained(source, evidence, vectors):
    """The loss of merged task vectors over all examples, in float64: the mean over tasks."""
    losses = []
    for task in source.tasks:
        expert = evidence.passes.classifier(task).double()
        weights = {f"backbone.{p.name}": (source.base(p) + vectors[p.name]).double() for p in source.parameters}
        batches = [inputs(batch) for batch in evidence.passes.batches[task]]
        aimed = torch.cat([centred(expert(**batch).logits) for batch in batches])
        found = torch.cat([centred(functional_call(expert, weights, (), batch).logits) for batch in batches])
        losses.append((found - aimed).square().sum() / (aimed - aimed.mean(dim=0)).square().sum())
    return sum(losses) / len(losses)


def whole_batches(evidence):
    """The same evidence with all examples of a task in one batch, so that there is no order to shuffle."""
    joined = {
        task: [{name: torch.cat([batch[name] for batch in batches]) for name in batches[0]}]
        for task, batches in evidence.passes.batches.items()
    }
    return replace(evidence, passes=replace(evidence.passes, batches=joined))


def test_it_is_adam_on_the_share_that_is_not_explained(walkable):
    source, evidence = walkable
    evidence = whole_batches(evidence)
    steps, rate = 12, 0.03
    merged = merge(make(epochs=steps, rate=rate), source, evidence)

    values = {name: value.double() for name, value in evidence.anchor.items()}
    first = {name: torch.zeros_like(value) for name, value in values.items()}
    second = {name: torch.zeros_like(value) for name, value in values.items()}
    # Ramps by hand: 12 steps, of which 1.2 rise.
    factors = [1 / 1.2, *np.linspace(11 / 10.8, 1 / 10.8, 11)]
    for step, factor in enumerate(factors, start=1):
        leaves = {name: value.clone().requires_grad_() for name, value in values.items()}
        loss = unexplained(source, evidence, leaves)
        gradients = torch.autograd.grad(loss, list(leaves.values()))
        for name, gradient in zip(list(values), gradients, strict=True):
            first[name] = 0.9 * first[name] + 0.1 * gradient
            second[name] = 0.999 * second[name] + 0.001 * gradient**2
            root = (second[name] / (1 - 0.999**step)).sqrt() + 1e-8
            values[name] = values[name] - min(factor, 1.0) * rate * first[name] / (1 - 0.9**step) / root
    for name, value in values.items():
        assert torch.allclose(merged.vectors[name], value.float(), atol=3e-4), name
        assert not torch.allclose(merged.vectors[name], evidence.anchor[name], atol=3e-3), name


def test_order_steps_and_schedule_are_those_of_a_plain_loop(walkable):
    """Three epochs of batches that are cut and shuffled; task two has fewer of them. Weights agree to 1e-6."""
    source, evidence = walkable
    batches = {**evidence.passes.batches, "two": evidence.passes.batches["two"][:2]}
    evidence = replace(evidence, passes=replace(evidence.passes, batches=batches))
    merged = merge(make(epochs=3, rate=0.01, batch_size=1, seed=4), source, evidence)

    experts = {task: evidence.passes.classifier(task) for task in source.tasks}
    weights = {p.name: nn.Parameter(source.base(p) + evidence.anchor[p.name]) for p in source.parameters}
    examples, aims, spread = {}, {}, {}
    for task, found in batches.items():
        rows = [{name: tensor[[row]] for name, tensor in inputs(b).items()} for b in found for row in range(2)]
        with torch.no_grad():
            examples[task], aims[task] = rows, [centred(experts[task](**row).logits) for row in rows]
        every = torch.cat(aims[task])
        spread[task] = (every - every.mean(dim=0)).square().sum() / len(every)
    generator = torch.Generator().manual_seed(4)
    orders = {
        task: torch.cat([torch.randperm(len(rows), generator=generator) for _ in range(-(-18 // len(rows)))]).tolist()
        for task, rows in examples.items()
    }
    optimiser = torch.optim.Adam(weights.values())
    for step in range(18):
        optimiser.param_groups[0]["lr"] = 0.01 * min((step + 1) / 1.8, (18 - step) / 16.2, 1.0)
        optimiser.zero_grad()
        for task in source.tasks:
            index = orders[task][step]
            named = {f"backbone.{name}": weight for name, weight in weights.items()}
            answer = centred(functional_call(experts[task], named, (), examples[task][index]).logits)
            ((answer - aims[task][index]).square().sum() / spread[task] / 2).backward()
        optimiser.step()
    for parameter in source.parameters:
        expected = weights[parameter.name].detach() - source.base(parameter)
        assert torch.allclose(merged.vectors[parameter.name], expected, rtol=0, atol=1e-6), parameter.name
        assert not torch.allclose(expected, evidence.anchor[parameter.name], atol=1e-2), parameter.name


def test_training_makes_the_experts_logits_out_of_the_anchor(walkable):
    source, evidence = walkable
    merged = merge(make(epochs=60, rate=0.02), source, evidence)
    assert unexplained(source, evidence, merged.vectors) < 0.1 * unexplained(source, evidence, evidence.anchor)


def test_the_order_of_tasks_does_not_matter_and_the_seed_does(walkable):
    source, evidence = walkable
    one = merge(make(rate=0.01), source, evidence)
    source.tasks = tuple(reversed(source.tasks))
    other = merge(make(rate=0.01), source, evidence)
    seeded = merge(make(rate=0.01, seed=5), source, evidence)
    assert all(torch.equal(vector, other.vectors[name]) for name, vector in one.vectors.items())
    assert any(not torch.equal(vector, seeded.vectors[name]) for name, vector in one.vectors.items())


def test_an_anchor_that_says_it_all_stays(walkable):
    source, evidence = walkable
    source._vectors["two"] = source._vectors["one"]
    merged = merge(make(epochs=2), source, replace(evidence, anchor=source._vectors["one"]))
    for name, vector in merged.vectors.items():
        assert torch.allclose(vector, source._vectors["one"][name], atol=1e-5), name


def test_weights_that_no_expert_has_changed_stay_the_anchors(walkable):
    source, evidence = walkable
    for task in source.tasks:
        source._vectors[task]["words.weight"].zero_()
    merged = merge(make(rate=0.01), source, evidence)
    moved = {name: float((vector - evidence.anchor[name]).abs().max()) for name, vector in merged.vectors.items()}
    # The difference to the base rounds.
    assert moved.pop("words.weight") < 1e-6
    assert min(moved.values()) > 1e-3


def test_experts_that_do_not_differ_from_the_base_give_the_anchor(walkable):
    source, evidence = walkable
    for task in source.tasks:
        for vector in source._vectors[task].values():
            vector.zero_()
    merged = merge(make(), source, evidence)
    for name, vector in merged.vectors.items():
        assert torch.allclose(vector, evidence.anchor[name], atol=1e-6), name


def test_a_task_with_fewer_examples_is_shown_them_more_often(walkable):
    source, evidence = walkable
    batches = dict(evidence.passes.batches)
    batches["two"] = batches["two"][:1]
    fewer = replace(evidence, passes=replace(evidence.passes, batches=batches))
    shown = []

    def counted(task):
        model = fewer.passes.classifier(task)
        model.register_forward_pre_hook(lambda *_: shown.append(task) if torch.is_grad_enabled() else None)
        return model

    merge(make(epochs=4), source, replace(fewer, passes=replace(fewer.passes, classifier=counted)))
    # Three batches of the longest task in each of four epochs.
    assert shown.count("one") == shown.count("two") == 12


@pytest.mark.parametrize(("size", "rows"), [(1, [1] * 6), (4, [3, 3]), (5, [3, 3]), (8, [6])])
def test_steps_take_as_many_examples_as_they_are_told(size, rows, walkable):
    source, evidence = walkable
    whole = whole_batches(evidence)
    taught = []

    def watched(task):
        model = whole.passes.classifier(task)
        model.register_forward_pre_hook(
            lambda _, args, batch: (
                taught.append(batch["input_ids"]) if task == "one" and torch.is_grad_enabled() else None
            ),
            with_kwargs=True,
        )
        return model

    watching = replace(whole, passes=replace(whole.passes, classifier=watched))
    merge(make(epochs=1, batch_size=size), source, watching)
    assert sorted(map(len, taught), reverse=True) == rows
    shown, all_of_them = torch.cat(taught), whole.passes.batches["one"][0]["input_ids"]
    assert sorted(shown.tolist()) == sorted(all_of_them.tolist())


def test_examples_count_alike_in_batches_of_all_sizes(walkable):
    source, evidence = walkable
    whole = whole_batches(evidence)
    uneven = {
        task: [{name: tensor[rows] for name, tensor in batch.items()} for rows in (slice(4), slice(4, None))]
        for task, (batch,) in whole.passes.batches.items()
    }

    def mean_error(passes, count):
        method = make()
        method.evidence = replace(evidence, passes=passes)
        examples = {task: passes.placed(task) for task in source.tasks}
        model = method.build(source, examples)
        return np.mean([float(model.of["one"].error(examples["one"][index]).detach()) for index in range(count)])

    expected = mean_error(whole.passes, 1)
    assert mean_error(replace(evidence.passes, batches=uneven), 2) == pytest.approx(expected, rel=1e-5)


def test_half_precision_is_for_the_passes_alone(walkable):
    source, evidence = walkable
    exact = merge(make(rate=0.01), source, evidence)
    mixed = merge(make(rate=0.01, precision="bf16-mixed"), source, evidence)
    for name, vector in mixed.vectors.items():
        assert vector.dtype == torch.float32
        # Eight bits of a value near one would give steps of 2^-8.
        assert not torch.equal((vector * 256).round() / 256, vector)
        moved = (exact.vectors[name] - evidence.anchor[name]).norm()
        assert 0 < (vector - exact.vectors[name]).norm() < 0.5 * moved, name


def test_an_expert_that_always_says_the_same_counts_by_the_plain_difference(walkable):
    source, evidence = walkable

    def constant(task):
        model = evidence.passes.classifier(task)
        if task == "one":
            # Whatever the words, the norm behind the last block gives out its shift, as good as exactly.
            nn.init.constant_(model.backbone.layers[-1].norm.weight, 1e-6)
        return model

    merged = merge(
        make(epochs=40, rate=0.02), source, replace(evidence, passes=replace(evidence.passes, classifier=constant))
    )

    @torch.no_grad()
    def error(task, vectors):
        expert = constant(task)
        weights = {f"backbone.{p.name}": source.base(p) + vectors[p.name] for p in source.parameters}
        batch = inputs(whole_batches(evidence).passes.batches[task][0])
        difference = centred(functional_call(expert, weights, (), batch).logits) - centred(expert(**batch).logits)
        return float(difference.square().sum(dim=1).mean())

    # Were it divided by what rounding leaves of a variance, this task would drown the other one.
    assert error("one", merged.vectors) < 0.1 * error("one", evidence.anchor)
    assert error("two", merged.vectors) < 0.01 * error("two", evidence.anchor)


def test_the_experts_and_the_merged_model_run_without_dropout(walkable):
    source, evidence = walkable

    def training(task):
        return evidence.passes.classifier(task).train()

    quiet = merge(make(rate=0.01), source, evidence)
    other = merge(make(rate=0.01), source, replace(evidence, passes=replace(evidence.passes, classifier=training)))
    assert all(torch.equal(vector, other.vectors[name]) for name, vector in quiet.vectors.items())


def test_each_epoch_is_told(walkable, caplog):
    source, evidence = walkable
    with caplog.at_level(logging.INFO, logger="pave_lightning"):
        merge(make(epochs=3, rate=0.02), source, evidence)
    told = [record.getMessage() for record in caplog.records]
    shares = [float(line.split(": ")[1].split()[0]) for line in told]
    assert [line.split(":")[0].strip() for line in told] == ["epoch 1", "epoch 2", "epoch 3"]
    assert shares[0] > shares[-1] > 0


def test_what_it_needs_is_told_at_once(walkable):
    source, evidence = walkable
    headless = Evidence(passes=replace(evidence.passes, classifier=None))
    with pytest.raises(PaveError, match=r"anchor(.|\n)*the experts' heads are needed"):
        merge(make(), source, headless)


def test_divergence_and_broken_experts_are_told(walkable):
    source, evidence = walkable
    with pytest.raises(PaveError, match=r"diverged: it went from \S+ to \S+ of the variance(.|\n)*smaller 'rate'"):
        merge(make(rate=1e30), source, evidence)
    with pytest.raises(PaveError, match="diverged"):
        merge(make(rate=100.0, epochs=1), source, whole_batches(evidence))

    def broken(task):
        model = evidence.passes.classifier(task)
        nn.init.constant_(model.head.bias, float("inf"))
        return model

    with pytest.raises(PaveError, match=r"the expert of task 'one' holds NaN or infinity in head\.bias"):
        merge(make(), source, replace(evidence, passes=replace(evidence.passes, classifier=broken)))
    evidence.anchor["words.weight"][0, 0] = float("nan")
    with pytest.raises(PaveError, match=r"the anchor's words\.weight holds NaN"):
        merge(make(), source, evidence)


@pytest.mark.parametrize(("steps", "first", "last"), [(1, 1.0, 1.0), (2, 1.0, 1.0), (20, 0.5, 1 / 18)])
def test_the_rate_rises_and_falls(steps, first, last):
    factors = [rate_factor(step, steps) for step in range(steps)]
    assert factors[0] == pytest.approx(first)
    assert factors[-1] == pytest.approx(last)
    assert max(factors) == pytest.approx(1.0)
    assert rate_factor(steps, steps) == 0
