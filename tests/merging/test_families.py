"""Families of transformers, tiny and random: each is walked through as its own forward does, or refused by the plan."""

import re
from functools import partial

import pytest
import torch
import transformers as hf

from pave_lightning.merging import Evidence, merge
from pave_lightning.merging.blocks import BlockStack
from pave_lightning.merging.methods.distillation import Distillation, DistillationOptions
from pave_lightning.merging.methods.feature_calibration import FeatureCalibration, FeatureCalibrationOptions
from pave_lightning.merging.methods.regmean_blocks import RegMeanBlocks
from pave_lightning.merging.passes import ForwardPasses
from pave_lightning.pipeline.planning.blocks import block_problem
from pave_lightning.weights.backbones import backbone_of

WORDS, WIDTH, LAYERS = 60, 32, 3
SHORT = {"vocab_size": WORDS, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
OLD = {**SHORT, "n_embd": WIDTH, "n_layer": LAYERS, "n_head": 2, "n_positions": 80}
STANDARD = {
    **SHORT,
    "hidden_size": WIDTH,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": 2,
    "intermediate_size": 48,
    "max_position_embeddings": 80,
}
GROUPED = {**STANDARD, "num_key_value_heads": 1, "head_dim": 16}
DEBERTA = {**STANDARD, "relative_attention": True, "pooler_hidden_size": WIDTH, "pos_att_type": ["p2c", "c2p"]}
DEBERTA_2 = {**DEBERTA, "position_buckets": 16, "norm_rel_ebd": "layer_norm", "position_biased_input": False}

WALKED = {
    "bert": lambda: hf.BertConfig(**STANDARD),
    "roberta": lambda: hf.RobertaConfig(**STANDARD),
    "xlm-roberta": lambda: hf.XLMRobertaConfig(**STANDARD),
    "distilbert": lambda: hf.DistilBertConfig(**SHORT, dim=WIDTH, n_layers=LAYERS, n_heads=2, hidden_dim=48),
    "electra": lambda: hf.ElectraConfig(**STANDARD, embedding_size=16),
    "mpnet": lambda: hf.MPNetConfig(**STANDARD),
    "deberta": lambda: hf.DebertaConfig(**DEBERTA, max_relative_positions=16),
    "deberta-v2": lambda: hf.DebertaV2Config(**DEBERTA_2, share_att_key=False),
    "deberta-v3": lambda: hf.DebertaV2Config(**DEBERTA_2, share_att_key=True),
    "modernbert": lambda: hf.ModernBertConfig(**STANDARD, global_attn_every_n_layers=2, local_attention=6),
    "bigbird": lambda: hf.BigBirdConfig(**STANDARD, block_size=2, num_random_blocks=1),
    "gpt2": lambda: hf.GPT2Config(**OLD),
    "gpt-j": lambda: hf.GPTJConfig(**OLD, rotary_dim=8),
    "gpt-neox": lambda: hf.GPTNeoXConfig(**STANDARD),
    "bloom": lambda: hf.BloomConfig(**SHORT, hidden_size=WIDTH, n_layer=LAYERS, n_head=2),
    "opt": lambda: hf.OPTConfig(
        **SHORT, hidden_size=WIDTH, num_hidden_layers=LAYERS, ffn_dim=48, num_attention_heads=2, word_embed_proj_dim=16
    ),
    "llama": lambda: hf.LlamaConfig(**GROUPED),
    "mistral": lambda: hf.MistralConfig(**GROUPED, sliding_window=4),
    "qwen2": lambda: hf.Qwen2Config(**GROUPED, use_sliding_window=True, sliding_window=4, max_window_layers=1),
    "qwen3": lambda: hf.Qwen3Config(**GROUPED),
    "gemma2": lambda: hf.Gemma2Config(**GROUPED, sliding_window=4),
    "gemma3": lambda: hf.Gemma3TextConfig(
        **GROUPED, sliding_window=4, layer_types=["sliding_attention", "sliding_attention", "full_attention"]
    ),
    "phi3": lambda: hf.Phi3Config(**STANDARD, num_key_value_heads=1),
    "mixtral": lambda: hf.MixtralConfig(**GROUPED, num_local_experts=4),
}
SIDE_BY_SIDE = "it has an encoder beside a decoder"
REFUSED = {
    "albert": (
        lambda: hf.AlbertConfig(**STANDARD, embedding_size=16),
        r"each block of encoder\.albert_layer_groups once and in order \(it has 1 of them and makes 3 calls\)",
    ),
    "t5": (
        lambda: hf.T5Config(**SHORT, d_model=WIDTH, d_kv=16, d_ff=48, num_layers=2, num_heads=2),
        SIDE_BY_SIDE,
    ),
    "bart": (
        lambda: hf.BartConfig(**SHORT, d_model=WIDTH, encoder_layers=2, decoder_layers=2, max_position_embeddings=80),
        SIDE_BY_SIDE,
    ),
    "xlnet": (
        lambda: hf.XLNetConfig(**SHORT, d_model=WIDTH, n_layer=2, n_head=2, d_inner=48),
        "its blocks work on other token positions than the batch has",
    ),
    "deberta-v2-xlarge": (
        lambda: hf.DebertaV2Config(**DEBERTA_2, conv_kernel_size=3),
        r"the input of encoder\.layer\.1 is not just the output of the block before",
    ),
    "longformer": (
        lambda: hf.LongformerConfig(**STANDARD, attention_window=4),
        "LongformerForSequenceClassification gives it global_attention_mask as well",
    ),
    "funnel": (
        lambda: hf.FunnelConfig(**SHORT, block_sizes=[1, 1], d_model=WIDTH, n_head=2, d_head=16, d_inner=48),
        r"does not run each block of encoder\.blocks once",
    ),
    "reformer": (
        lambda: hf.ReformerConfig(
            **SHORT, hidden_size=WIDTH, attention_head_size=16, num_attention_heads=2, feed_forward_size=48,
            attn_layers=["local", "local"], axial_pos_embds=False, local_attn_chunk_length=4, is_decoder=False,
        ),
        "it cannot be run so on a task's examples",
    ),
}  # fmt: skip
# One of each way in which blocks are called; the others are slow only because they are many.
QUICK = ("bert", "deberta-v3", "modernbert", "gpt2", "qwen3", "gemma2")
FAMILIES = [name if name in QUICK else pytest.param(name, marks=pytest.mark.slow) for name in WALKED]
SOME_REFUSED = [name if name in {"albert", "t5"} else pytest.param(name, marks=pytest.mark.slow) for name in REFUSED]


def classifier_of(config, seed=0):
    torch.manual_seed(seed)
    return hf.AutoModelForSequenceClassification.from_config(config).eval()


def batch_of(side, lengths=(5, 9, 2)):
    mask = torch.arange(max(lengths)) < torch.tensor(lengths)[:, None]
    mask = mask.flip(1) if side == "left" else mask
    ids = torch.randint(5, WORDS, mask.shape, generator=torch.Generator().manual_seed(sum(lengths)))
    return {"input_ids": ids * mask, "attention_mask": mask.long()}


@pytest.fixture
def request_of(make_source, described):
    """Two experts of a family and what methods need to know of them; the anchor is the mean of the experts.

    An expert is noise on the backbone; the noise is the same for both where it is ``shared``.
    """

    def build(name, side="right", *, shared=False):
        original = backbone_of(classifier_of(WALKED[name]()))
        base = {key: tensor.detach().numpy() for key, tensor in original.named_parameters()}
        random = torch.Generator().manual_seed(1)
        first, other = (
            {key: 0.05 * torch.randn(value.shape, generator=random).numpy() for key, value in base.items()}
            for _ in range(2)
        )
        source = make_source({"one": first, "two": first if shared else other}, base=base)
        source.parameters = described(original)

        def put_weights(backbone, read):
            with torch.no_grad():
                for parameter in source.parameters:
                    backbone.get_parameter(parameter.name).copy_(read(parameter))

        def classifier(task):
            made = classifier_of(WALKED[name](), seed=3)
            put_weights(backbone_of(made), partial(source.expert, task))
            return made

        def backbone():
            made = backbone_of(classifier_of(WALKED[name](), seed=4))
            put_weights(made, source.base)
            return made

        batches = {task: [batch_of(side, (5, 9, 2 + i)) for i in range(3)] for task in source.tasks}
        anchor = {
            p.name: torch.stack([source.vector(task, p) for task in source.tasks]).mean(dim=0)
            for p in source.parameters
        }
        return source, Evidence(passes=ForwardPasses(backbone, source, batches, classifier=classifier), anchor=anchor)

    return build


@pytest.mark.parametrize("side", ["right", "left"])
@pytest.mark.parametrize("name", FAMILIES)
@torch.no_grad()
def test_each_block_is_given_what_the_model_gives_it(name, side):
    backbone, batch = backbone_of(classifier_of(WALKED[name]())), batch_of(side)
    expected = backbone(**batch, output_hidden_states=True).hidden_states
    stack = BlockStack(backbone)
    stack.check(batch)
    entry = stack.enter(batch)
    assert len(stack.blocks) == LAYERS
    for index in range(LAYERS):
        assert torch.allclose(entry.rows(entry.hidden), entry.rows(expected[index]), atol=1e-5), index
        stack.advance(index, [entry])
    assert len(entry.rows(entry.hidden)) == 5 + 9 + 2


@pytest.mark.parametrize("name", FAMILIES)
def test_plan_lets_it_through(name, tmp_path):
    WALKED[name]().save_pretrained(tmp_path)
    assert block_problem(tmp_path, "AutoModelForSequenceClassification") is None


@pytest.mark.parametrize("name", SOME_REFUSED)
def test_plan_refuses_it_with_the_one_message(name, tmp_path):
    config, reason = REFUSED[name]
    config().save_pretrained(tmp_path)
    end = "; choose a method that does not work block by block"
    pattern = rf"\w+ cannot be calibrated block by block: [^;]*{reason}[^;]*{end}"
    assert re.fullmatch(pattern, block_problem(tmp_path, "AutoModelForSequenceClassification") or "")


@pytest.mark.parametrize("name", FAMILIES)
def test_regmean_plus_plus_keeps_equal_experts(name, request_of):
    source, evidence = request_of(name, shared=True)
    merged = merge(RegMeanBlocks(), source, evidence)
    for parameter in source.parameters:
        found, expected = merged.vectors[parameter.name], source.vector("one", parameter)
        assert torch.allclose(found, expected, atol=2e-3), parameter.name


@pytest.mark.parametrize("name", FAMILIES)
def test_featcal_keeps_equal_experts(name, request_of):
    """Student and teacher are one, and the ridge pulls to what they are; so every solve finds it again."""
    source, evidence = request_of(name, "left", shared=True)
    options = FeatureCalibrationOptions(extrapolation=1.0, unread_tokens=0.5)
    merged = merge(FeatureCalibration(options), source, evidence)
    for parameter in source.parameters:
        found, expected = merged.vectors[parameter.name], source.vector("one", parameter)
        assert torch.allclose(found, expected, atol=2e-3), parameter.name


@pytest.mark.parametrize("name", FAMILIES)
def test_methods_change_what_differs(name, request_of):
    source, evidence = request_of(name)
    for method in (RegMeanBlocks(), FeatureCalibration(), Distillation(DistillationOptions(epochs=1, rate=1e-5))):
        merged = merge(method, source, evidence).vectors
        assert all(torch.isfinite(value).all() for value in merged.values())
        changed = [p.name for p in source.parameters if not torch.allclose(merged[p.name], evidence.anchor[p.name])]
        layers = {p.name.rpartition(".")[0] for p in source.parameters if p.is_matrix}
        assert any(name.rpartition(".")[0] in layers for name in changed)
