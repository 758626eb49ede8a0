"""Fine-tuning: heads, frozen parts, adapters, resuming, models of other families."""

import pytest
import torch
from transformers import (
    AutoModelForSequenceClassification,
    DistilBertConfig,
    DistilBertModel,
    GPT2Config,
    GPT2Model,
    RobertaConfig,
    RobertaForMaskedLM,
    ViTConfig,
    ViTModel,
)

from pave_lightning.errors import PaveError
from pave_lightning.experts import task_expert
from pave_lightning.experts.adapters import load_adapter
from pave_lightning.experts.fitting import fit_expert, save_expert
from pave_lightning.experts.loading import expert_problem, load_base, load_with_new_head
from pave_lightning.experts.task_expert import TaskExpert, parameter_groups
from pave_lightning.tasks.heads import HeadForm
from pave_lightning.tasks.task import Task
from pave_lightning.weights.adapter_base import other_base


@pytest.fixture
def make_task(task_files):
    def build(kind="text_classification", trainer=None, metrics=None, **training):
        head = {"classes": ["low", "high"]} if kind == "text_classification" else {"kind": kind}
        return Task.model_validate(
            {
                "name": "words",
                "data": task_files(kind),
                "text": "text",
                **head,
                "metrics": metrics,
                "training": {"learning_rate": 1e-3, "batch_size": 16, "max_length": 16, **training},
                "trainer": {"max_epochs": 1, "accelerator": "cpu", "enable_progress_bar": False, **(trainer or {})},
            }
        )

    return build


@pytest.fixture
def fit(tmp_path):
    def run(task, base, seed=0):
        return fit_expert(task, base, seed=seed, work_folder=tmp_path / "work", cache_folder=tmp_path / "data")[0]

    return run


def test_a_head_that_the_base_has_is_not_kept(expert_folders, make_task):
    base = expert_folders["first"]
    own = AutoModelForSequenceClassification.from_pretrained(base)
    torch.manual_seed(0)
    model = load_with_new_head(base, make_task())
    again = load_with_new_head(base, make_task("regression"))
    assert not torch.allclose(model.classifier.weight, own.classifier.weight, atol=1e-3)
    assert again.classifier.weight.shape == (1, 32)
    torch.testing.assert_close(model.bert.state_dict(), own.bert.state_dict(), rtol=0, atol=0)


def test_head_and_backbone_have_rates_of_their_own_and_vectors_do_not_decay(base_folder, make_task):
    task = make_task(head_learning_rate=0.5, weight_decay=0.1)
    model = load_with_new_head(base_folder, task)
    rates = {}
    for group in parameter_groups(model, task, task.training):
        for parameter in group["params"]:
            rates[id(parameter)] = (group["lr"], group["weight_decay"])
    assert rates[id(model.classifier.weight)] == (0.5, 0.1)
    assert rates[id(model.classifier.bias)] == (0.5, 0.0)
    assert rates[id(model.bert.pooler.dense.weight)] == (1e-3, 0.1)
    assert rates[id(model.bert.embeddings.LayerNorm.weight)] == (1e-3, 0.0)
    assert len(rates) == len(list(model.parameters()))


def test_dropout_is_on_while_training(base_folder, make_task, tmp_path):
    seen = []

    class Watching(TaskExpert):
        def training_step(self, batch, batch_idx):
            seen.append(all(module.training for module in self.model.modules()))
            return super().training_step(batch, batch_idx)

    from pave_lightning.experts import fitting

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(fitting, "TaskExpert", Watching)
        task = make_task(trainer={"max_epochs": 2})
        fitting.fit_expert(task, base_folder, seed=0, work_folder=tmp_path / "w", cache_folder=tmp_path / "d")
    assert len(seen) == 6
    assert all(seen)


@pytest.mark.parametrize("lora", [None, {"rank": 2}])
def test_frozen_parts_do_not_move_and_others_do(base_folder, make_task, fit, tmp_path, lora):
    task = make_task(freeze=["embeddings", "encoder.layer.0"], lora=lora)
    save_expert(fit(task, base_folder), base_folder, tmp_path)
    base = AutoModelForSequenceClassification.from_pretrained(base_folder).bert.state_dict()
    moved = {
        name
        for name, value in AutoModelForSequenceClassification.from_pretrained(tmp_path).bert.state_dict().items()
        if not torch.equal(value, base[name])
    }
    assert not [name for name in moved if name.startswith(("embeddings", "encoder.layer.0"))]
    assert "encoder.layer.1.attention.self.query.weight" in moved


def test_an_adapter_is_the_whole_expert_also_where_the_base_has_no_pooler(make_base, make_task, fit, tmp_path):
    base = make_base(pooler=False)
    task = make_task(lora={"rank": 2})
    save_expert(fit(task, base), base, tmp_path)
    expert = AutoModelForSequenceClassification.from_pretrained(tmp_path).state_dict()
    torch.manual_seed(99)
    assert other_base(tmp_path / "adapter", str(base), base) is None
    taken = load_adapter(base, tmp_path / "adapter", task).state_dict()
    torch.testing.assert_close(taken, expert, rtol=0, atol=1e-6)


def families(vocabulary):
    small = {"vocab_size": vocabulary, "pad_token_id": 0}
    yield (
        "roberta",
        RobertaForMaskedLM(
            RobertaConfig(
                **small,
                hidden_size=32,
                num_hidden_layers=1,
                num_attention_heads=2,
                intermediate_size=64,
                max_position_embeddings=40,
            )
        ),
    )
    yield (
        "distilbert",
        DistilBertModel(
            DistilBertConfig(**small, dim=32, n_layers=1, n_heads=2, hidden_dim=64, max_position_embeddings=40)
        ),
    )
    yield "gpt2", GPT2Model(GPT2Config(vocab_size=vocabulary, n_embd=32, n_layer=1, n_head=2, n_positions=40))


@pytest.mark.parametrize("family", ["roberta", "distilbert", "gpt2"])
@pytest.mark.parametrize("lora", [None, {"rank": 2}])
def test_other_families(family, lora, tiny_tokenizer, make_task, fit, tmp_path):
    base = tmp_path / "base"
    dict(families(len(tiny_tokenizer)))[family].save_pretrained(base)
    tiny_tokenizer.save_pretrained(base)
    target = tmp_path / "expert"
    target.mkdir()
    save_expert(fit(make_task(lora=lora), base), base, target)
    model = AutoModelForSequenceClassification.from_pretrained(target)
    assert model.config.num_labels == 2
    assert model.config.pad_token_id == 0


@pytest.mark.parametrize(
    ("trainer", "told"),
    [({"limit_val_batches": 0}, "no validation pass ended"), ({"max_epochs": 0}, "nothing was trained")],
    ids=str,
)
def test_training_without_validation_is_refused(base_folder, make_task, fit, trainer, told):
    with pytest.raises(PaveError, match=told):
        fit(make_task(trainer=trainer), base_folder)


def test_what_lightning_refuses_when_fitting_begins_is_a_mistake_of_the_user(base_folder, make_task, fit):
    with pytest.raises(PaveError, match="limit_val_batches"):
        fit(make_task(trainer={"limit_val_batches": 0.01}), base_folder)


def test_gradients_are_clipped_under_a_mixed_precision(base_folder, make_task, tmp_path):
    """What is left of the gradients here is far below AdamW's epsilon, so hardly anything moves."""
    start = load_with_new_head(base_folder, make_task()).bert
    moved = []
    for options in ({"gradient_clip_val": 1e-12}, {}):
        task = make_task(trainer={"precision": "bf16-mixed", **options}, weight_decay=0.0)
        places = {"work_folder": tmp_path / f"work{len(moved)}", "cache_folder": tmp_path / "data"}
        found, _ = fit_expert(task, base_folder, seed=0, **places)
        pairs = zip(found.bert.encoder.parameters(), start.encoder.parameters(), strict=True)
        moved.append(max(float((one - other).abs().max()) for one, other in pairs))
    assert moved[0] < 0.1 * moved[1]


def test_diverged_training_is_told(base_folder, make_task, fit):
    with pytest.raises(PaveError, match="NaN or infinite outputs; training has diverged by step 3: lower"):
        fit(make_task(learning_rate=1e30, head_learning_rate=1e30, warmup_share=0.0), base_folder)


def test_an_expert_that_has_hardly_learned_is_told(base_folder, make_task, fit, caplog):
    still = {"learning_rate": 1e-12, "head_learning_rate": 1e-12}
    fit(make_task(metrics=["matthews"], **still), base_folder)  # one answer for all rows: Matthews is zero
    assert "the expert of words (0.000, always the same answer: 0.000) has hardly learned its task" in caplog.text
    assert "try other learning rates or more rows" in caplog.text


@pytest.mark.parametrize(
    "trainer",
    [
        {"max_steps": 2},
        {"max_steps": 5, "max_epochs": 4},
        {"check_val_every_n_epoch": 3},
        {"max_steps": 2, "min_epochs": 2},
    ],
    ids=str,
)
def test_the_last_steps_are_validated_once_more(base_folder, make_task, tmp_path, trainer, monkeypatch):
    """Learning goes up here with each step, so the weights after the last one are the best."""
    steps = []
    step = TaskExpert.training_step
    monkeypatch.setattr(TaskExpert, "training_step", lambda self, *given: steps.append(1) or step(self, *given))
    validate, heads = TaskExpert.on_validation_epoch_end, []

    def noting(self):
        heads.append(self.model.classifier.weight.detach().clone())
        validate(self)

    monkeypatch.setattr(TaskExpert, "on_validation_epoch_end", noting)
    scored = iter(range(100))
    monkeypatch.setattr(task_expert, "scores", lambda metrics: {"accuracy": 0.001 * next(scored)})
    model, metrics = fit_expert(
        make_task(trainer=trainer), base_folder, seed=0, work_folder=tmp_path / "w", cache_folder=tmp_path / "d"
    )
    assert len(steps) == trainer.get("max_steps", 3)
    assert metrics["validation/accuracy"] == pytest.approx(0.001 * (next(scored) - 1))
    torch.testing.assert_close(model.classifier.weight, heads[-1], rtol=0, atol=0)


def test_early_stopping_does_without_a_validation_pass_in_the_epoch(base_folder, make_task, fit):
    fit(make_task(trainer={"max_steps": 2}, early_stopping={"patience": 2}), base_folder)


def test_early_stopping_stops(base_folder, make_task, fit, tmp_path):
    rates = {"learning_rate": 1e-12, "head_learning_rate": 1e-12}
    fit(make_task(trainer={"max_epochs": 40}, early_stopping={"patience": 2}, **rates), base_folder)
    state = torch.load(tmp_path / "work" / "last.ckpt", weights_only=True)
    assert state["epoch"] == 2


@pytest.mark.parametrize("pooler", [True, False])
def test_a_base_that_reads_images_needs_no_tokenizer(tmp_path, pooler):
    config = ViTConfig(hidden_size=8, num_hidden_layers=1, num_attention_heads=2, intermediate_size=8, image_size=8)
    config.patch_size = 4
    base = ViTModel(config, add_pooling_layer=pooler)
    base.save_pretrained(tmp_path / "base")
    form = HeadForm("AutoModelForImageClassification", "FEATURE_EXTRACTION", {"num_labels": 3})
    model = load_base(tmp_path / "base", form)
    assert model.classifier.out_features == 3
    for name, value in model.vit.state_dict().items():
        assert torch.equal(value, base.state_dict()[name])
    (tmp_path / "expert").mkdir()
    save_expert(model, tmp_path / "base", tmp_path / "expert")
    assert expert_problem(tmp_path / "expert", form.auto_model) is None
