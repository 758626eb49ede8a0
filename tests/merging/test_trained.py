"""The seam for methods that learn, by one that learns how much of each task vector every layer takes."""

import subprocess
import sys

import pytest
import torch
from torch import nn
from torch.func import functional_call

from pave_lightning.merging import Need, TrainedMethod, TrainedOptions, merge
from pave_lightning.merging.trained import parts


class Mixture(nn.Module):
    """The base plus coefficients times task vectors, under each task's head."""

    def __init__(self, source, passes):
        super().__init__()
        self.tasks = sorted(source.tasks)
        self.names = [parameter.name for parameter in source.parameters]
        self.base = {p.name: source.base(p) for p in source.parameters}
        self.vectors = {p.name: [source.vector(task, p) for task in self.tasks] for p in source.parameters}
        self.coefficients = nn.Parameter(torch.full((len(self.names), len(self.tasks)), 0.3))
        self.experts = nn.ModuleList(passes.headed(task) for task in self.tasks).requires_grad_(False)

    def weights(self):
        pairs = zip(self.names, self.coefficients, strict=True)
        mixed = {name: sum(c * v for c, v in zip(row, self.vectors[name], strict=True)) for name, row in pairs}
        return {f"backbone.{name}": self.base[name] + mixed[name] for name in self.names}

    def forward(self, batch, task):
        return functional_call(self.experts[self.tasks.index(task)], self.weights(), (), batch).logits


class LayerCoefficients(TrainedMethod):
    summary = source = "a test"
    needs = frozenset({Need.UNLABELLED_EXAMPLES})

    def build(self, vectors, examples):
        return Mixture(vectors, self.evidence.forward_passes)

    def training_step(self, model, batch, task):
        return distance(model, batch, task)

    def learned(self, model):
        self.names, self.coefficients = model.names, model.coefficients.detach().clone()

    def merge(self, parameter, base, vectors):
        row = self.coefficients[self.names.index(parameter.name)]
        return sum(c * vectors[task] for c, task in zip(row, sorted(vectors), strict=True))


def distance(model, batch, task):
    """How far the mixture's answers are from the expert's."""
    with torch.no_grad():
        aim = model.experts[model.tasks.index(task)](**batch).logits
    return (model(batch, task) - aim).square().mean()


def make(kind=LayerCoefficients, **options):
    return kind(TrainedOptions(**options))


def test_learned_coefficients_are_those_of_a_plain_loop(walkable):
    """The rate is constant, the two tasks' batches are shuffled by one generator, task one's first."""
    source, evidence = walkable
    epochs, rate, seed = 4, 0.02, 3
    merged = merge(make(epochs=epochs, rate=rate, seed=seed), source, evidence)

    model = Mixture(source, evidence.passes)
    generator = torch.Generator().manual_seed(seed)
    orders = {t: [int(i) for _ in range(epochs) for i in torch.randperm(3, generator=generator)] for t in source.tasks}
    optimiser = torch.optim.Adam([model.coefficients], lr=rate)
    for step in range(3 * epochs):
        batches = {t: dict(evidence.passes.batches[t][orders[t][step]]) for t in source.tasks}
        for batch in batches.values():
            del batch["labels"]
        loss = sum(distance(model, batch, task) for task, batch in batches.items()) / 2
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
    coefficients = model.coefficients.detach()
    assert (coefficients - 0.3).abs().min() > 1e-3, "every one has moved"
    for index, parameter in enumerate(source.parameters):
        expected = sum(c * source.vector(t, parameter) for c, t in zip(coefficients[index], source.tasks, strict=True))
        # The sum of two losses has the gradient of one plus that of the other, to rounding.
        assert torch.allclose(merged.vectors[parameter.name], expected, atol=1e-5), parameter.name


def test_one_graph_at_a_time(walkable):
    """When the second task's loss is computed, the first one's half of the gradient is there already."""
    source, evidence = walkable
    steps = []

    class Watched(LayerCoefficients):
        def training_step(self, model, batch, task):
            loss = super().training_step(model, batch, task)
            if task == "one":
                steps.append(torch.autograd.grad(loss, model.coefficients, retain_graph=True)[0] / 2)
            else:
                assert torch.allclose(model.coefficients.grad, steps[-1], atol=1e-7)
            return loss

    merge(make(Watched, epochs=2), source, evidence)
    assert len(steps) == 6
    assert all(gradient.any() for gradient in steps)


def test_the_seed_decides_and_nothing_that_was_drawn_before(walkable):
    source, evidence = walkable

    class Drawn(LayerCoefficients):
        def build(self, vectors, examples):
            model = super().build(vectors, examples)
            nn.init.normal_(model.coefficients)
            return model

        def training_step(self, model, batch, task):
            return super().training_step(model, batch, task) + 0.1 * (model.coefficients * torch.rand(())).sum()

    torch.manual_seed(1)
    first = merge(make(Drawn), source, evidence)
    drawn = torch.rand(3)
    torch.manual_seed(1)
    assert torch.equal(torch.rand(3), drawn)
    again, other = merge(make(Drawn), source, evidence), merge(make(Drawn, seed=1), source, evidence)
    for name, vector in first.vectors.items():
        assert torch.equal(again.vectors[name], vector)
        assert not torch.equal(other.vectors[name], vector)


def test_optimiser_schedule_and_trainer_are_the_methods_to_choose(walkable):
    """With steps down the gradient, clipped to length 2, the way is twice the sum of the rates at most."""
    source, evidence = walkable

    class Descending(LayerCoefficients):
        def optimiser(self, parameters):
            return torch.optim.SGD(parameters, lr=self.options.rate)

        def rate_factor(self, step, steps):
            return [1.0, 0.0, 0.5, 0.0, 0.0, 0.0][step] if steps == 6 else 1 / 0

        def trainer_options(self):
            return {"gradient_clip_val": 2.0}

        def training_step(self, model, batch, task):
            return 1e3 * model.coefficients.sum()

    method = make(Descending, rate=0.01)
    merge(method, source, evidence)
    moved = method.coefficients - 0.3
    assert torch.allclose(moved, torch.full_like(moved, -0.03 / moved.numel() ** 0.5), rtol=1e-4)


def test_hooks_see_every_epoch_and_modules_stay_in_their_mode(walkable):
    source, evidence = walkable
    told, modes = [], set()

    class Watched(LayerCoefficients):
        def build(self, vectors, examples):
            model = super().build(vectors, examples)
            model.experts[0].head.train()
            return model

        def training_step(self, model, batch, task):
            modes.add(tuple(module.training for module in (model.experts[0], model.experts[0].head)))
            return model.coefficients.square().sum()

        def before_training(self, model, examples):
            told.append(float(model.coefficients.detach().square().sum()))

        def after_epoch(self, model, examples, epoch, loss):
            assert {task: len(batches) for task, batches in examples.items()} == {"one": 3, "two": 3}
            told.append((epoch, loss))

    merge(make(Watched, epochs=3, rate=1e-3), source, evidence)
    before, *epochs = told
    assert [epoch for epoch, _ in epochs] == [1, 2, 3]
    losses = [loss for _, loss in epochs]
    assert before > losses[0] > losses[1] > losses[2] > 0
    assert modes == {(False, True)}


def test_mixed_precision_is_that_of_the_passes(walkable):
    source, evidence = walkable
    kinds = set()

    class Watched(LayerCoefficients):
        def training_step(self, model, batch, task):
            kinds.add((model(batch, task).dtype, model.coefficients.dtype))
            return super().training_step(model, batch, task)

    merge(make(Watched, precision="bf16-mixed"), source, evidence)
    assert kinds == {(torch.bfloat16, torch.float32)}


@pytest.mark.parametrize(
    ("rows", "size", "expected"), [(7, 3, [3, 2, 2]), (6, 8, [6]), (4, 1, [1] * 4), (8, 4, [4, 4])]
)
def test_parts_are_as_few_and_as_equal_as_can_be(rows, size, expected):
    batch = {"x": torch.arange(rows), "y": torch.arange(rows)[:, None]}
    found = list(parts(batch, size))
    assert [len(part["x"]) for part in found] == expected
    assert torch.equal(torch.cat([part["x"] for part in found]), batch["x"])
    assert all(torch.equal(part["x"], part["y"][:, 0]) for part in found)


def test_methods_are_there_without_lightning():
    code = "import sys, pave_lightning.merging as m; m.known_methods(); print('lightning' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"
