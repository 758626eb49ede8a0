"""What reaches each expert of a mixture, counted token by token by the definition of its router."""

import lightning.pytorch as L
import pytest
import torch
import transformers as hf
from torch import nn
from torch.utils.data import DataLoader

from pave_lightning.callbacks import PaveCallback
from pave_lightning.callbacks.experts import expert_stacks

TINY = {"vocab_size": 30, "hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2, "num_key_value_heads": 1}
SMALL = {**TINY, "intermediate_size": 12, "num_experts_per_tok": 2}
MIXTRAL = hf.MixtralConfig(**SMALL, num_local_experts=5)
JETMOE = hf.JetMoeConfig(
    vocab_size=30, hidden_size=8, num_hidden_layers=1, num_key_value_heads=2, kv_channels=4, intermediate_size=12,
    num_local_experts=5, num_experts_per_tok=2,
)  # fmt: skip
LLAMA_4 = hf.Llama4TextConfig(
    **{**SMALL, "num_experts_per_tok": 1, "intermediate_size": 12}, head_dim=4, intermediate_size_mlp=12,
    num_local_experts=5, pad_token_id=0,
)  # fmt: skip


class Module(L.LightningModule):
    def __init__(self, model):
        super().__init__()
        self.model = model

    def validation_step(self, batch, _):
        self.model(**batch)


def captured(model, batches, **options):
    callback = PaveCallback(backbone="model", **{"rows": None, "moments": "input", "keep_rows": False, **options})
    quiet = dict.fromkeys(("logger", "enable_progress_bar", "enable_model_summary", "enable_checkpointing"), False)
    trainer = L.Trainer(accelerator="cpu", devices=1, callbacks=callback, **quiet)
    trainer.validate(Module(model), DataLoader(batches, batch_size=None), verbose=False)
    return callback


def batch(lengths=(6, 4), seed=0):
    mask = torch.arange(max(lengths)) < torch.tensor(lengths)[:, None]
    ids = torch.randint(3, 30, mask.shape, generator=torch.Generator().manual_seed(seed))
    return {"input_ids": ids * mask, "attention_mask": mask.long()}


def model_of(config):
    torch.manual_seed(0)
    return hf.AutoModelForCausalLM.from_config(config).eval()


def routed(model, given, block):
    """What a mixture is given in a pass, flattened, and which tokens are real."""
    seen = []
    handle = model.get_submodule(block).register_forward_pre_hook(
        lambda module, args, kwargs: seen.append((*args, *kwargs.values())[0].reshape(-1, 8)), with_kwargs=True
    )
    with torch.no_grad():
        model(**given)
    handle.remove()
    return seen[0], given["attention_mask"].bool().flatten()


def test_each_expert_has_the_moment_of_the_real_tokens_that_its_router_sends_it():
    model, given = model_of(MIXTRAL), batch()
    callback = captured(model, [given])
    hidden, real = routed(model, given, "model.layers.0.mlp")
    block = model.model.layers[0].mlp
    chosen = (hidden @ block.gate.weight.T).softmax(-1).topk(2).indices
    reached = 0
    for number in range(5):
        rows = hidden[real & (chosen == number).any(-1)].detach()
        name = f"model.layers.0.mlp.experts.gate_up_proj.{number}"
        if not len(rows):
            assert name in callback.unreached
            continue
        reached += len(rows)
        assert callback.statistics.rows(name) == len(rows)
        torch.testing.assert_close(callback.statistics[name].matrix, rows.T @ rows / len(rows))
        gate, up = (rows @ block.experts.gate_up_proj[number].T).chunk(2, dim=-1)
        inner = (nn.functional.silu(gate) * up).detach()
        down = callback.statistics[f"model.layers.0.mlp.experts.down_proj.{number}"]
        torch.testing.assert_close(down.matrix, inner.T @ inner / len(rows))
    assert reached == 2 * 10


def test_experts_that_get_their_rows_from_their_parent_know_which_are_padding(recwarn):
    model, given = model_of(JETMOE), batch()
    callback = captured(model, [given])
    assert not any("which of them are padding" in str(warning.message) for warning in recwarn)
    hidden, real = routed(model, given, "model.layers.0.mlp")
    chosen = (hidden @ model.model.layers[0].mlp.router.layer.weight.T).topk(2).indices
    names = [name for name in callback.statistics if "mlp.input_linear." in name]
    assert names
    for name in names:
        number = int(name.rpartition(".")[2])
        rows = hidden[real & (chosen == number).any(-1)].detach()
        torch.testing.assert_close(callback.statistics[name].matrix, rows.T @ rows / len(rows))
    down = [callback.statistics.rows(name) for name in callback.statistics if "mlp.output_linear." in name]
    assert sum(down) == 2 * 10


@pytest.mark.parametrize("lengths", [(6, 4), (2, 1), (3, 3)])
def test_attention_of_experts_counts_no_padding(lengths):
    model, given = model_of(JETMOE), batch(lengths)
    callback = captured(model, [given])
    mixture = model.model.layers[0].self_attention.experts
    answers = []
    inner = mixture.reduce
    mixture.reduce = lambda heads, places: answers.append(heads) or inner(heads, places)
    hidden, real = routed(model, given, "model.layers.0.self_attention")
    chosen = (hidden @ mixture.router.layer.weight.T).topk(2).indices
    heads = answers[0].flatten(0, 1).detach()  # what each of a token's two experts gave, in the order of its choice
    counted = 0
    for number in range(5):
        reached = real & (chosen == number).any(-1)
        name = f"model.layers.0.self_attention.experts.{{}}.{number}"
        if not reached.any():
            assert name.format("input_linear") in callback.unreached
            continue
        counted += int(reached.sum())
        rows = hidden[reached].detach()
        torch.testing.assert_close(callback.statistics[name.format("input_linear")].matrix, rows.T @ rows / len(rows))
        out = heads[real[:, None] & (chosen == number)]
        assert len(out) == len(rows)
        torch.testing.assert_close(callback.statistics[name.format("output_linear")].matrix, out.T @ out / len(out))
    assert counted == 2 * sum(lengths)


def test_of_experts_that_are_multiplied_all_at_once_zero_rows_do_not_count():
    model, given = model_of(LLAMA_4), batch()
    callback = captured(model, [given])
    stacks = [name for name in callback.statistics if ".experts.gate_up_proj." in name]
    assert sum(callback.statistics.rows(name) for name in stacks) == 10


def test_experts_share_the_budget_of_rows():
    model = model_of(MIXTRAL)
    callback = captured(model, [batch(seed=seed) for seed in range(4)], rows=8)
    experts = [name for name in callback.statistics if "experts" in name]
    assert all(callback.statistics.rows(name) <= 8 for name in experts)
    assert any(callback.statistics.seen(name) > callback.statistics.rows(name) for name in experts)


def test_where_an_expert_narrows_its_cross_moment_is_taken():
    model, given = model_of(MIXTRAL), batch()
    name = "model.layers.0.mlp.experts.down_proj.0"
    cross = captured(model, [given], moments="smallest").statistics[name]
    weight = model.model.layers[0].mlp.experts.down_proj[0].detach()
    covariance = captured(model, [given]).statistics[name].matrix
    assert cross.kind == "cross"
    torch.testing.assert_close(cross.matrix, weight @ covariance)


def test_the_model_is_left_as_it_was():
    model = model_of(MIXTRAL)
    before = model.config._experts_implementation
    experts = model.model.layers[0].mlp.experts
    captured(model, [batch()])
    assert model.config._experts_implementation == before
    modules = [model.model.layers[0].mlp, experts]
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in modules)


def test_an_error_in_the_pass_leaves_no_watch_behind():
    model = model_of(MIXTRAL)
    handle = model.lm_head.register_forward_pre_hook(lambda module, args: 1 / 0)
    inner = model.model.layers[0].mlp.experts.act_fn.register_forward_pre_hook(lambda module, args: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        captured(model, [batch()])
    handle.remove()
    inner.remove()
    from torch.overrides import _get_current_function_mode

    assert _get_current_function_mode() is None


def test_positions_and_tables_with_three_axes_are_no_stacks():
    model = hf.ViTModel(hf.ViTConfig(hidden_size=8, num_hidden_layers=1, num_attention_heads=2, intermediate_size=8))
    assert expert_stacks(model) == {}
    assert len(expert_stacks(model_of(MIXTRAL))) == 2
