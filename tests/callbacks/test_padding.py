"""Padding is no data: batches give the moments of their examples, each alone and not padded."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import (
    AutoModelForSequenceClassification,
    BartConfig,
    BertConfig,
    GPT2Config,
    LlamaConfig,
    T5Config,
    T5ForConditionalGeneration,
)

from pave_lightning.callbacks.padding import shifted

WORDS, END = 40, 3
SPECIAL = {"vocab_size": WORDS, "pad_token_id": 0, "eos_token_id": END, "bos_token_id": 2}
SIDES = {f"{side}_{key}": n for side in ("encoder", "decoder") for key, n in (("layers", 2), ("attention_heads", 2))}
SMALL = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 24}
T5 = T5Config(**SPECIAL, d_model=16, d_kv=8, d_ff=24, num_layers=2, num_heads=2, decoder_start_token_id=0)
CONFIGS = {
    "t5": T5,
    "bart": BartConfig(**SPECIAL, **SIDES, d_model=16, encoder_ffn_dim=24, decoder_ffn_dim=24, num_labels=2),
    "bert": BertConfig(**SPECIAL, **SMALL),
    "gpt2": GPT2Config(**SPECIAL, n_embd=16, n_layer=2, n_head=2, n_positions=20),
    "llama": LlamaConfig(**SPECIAL, **SMALL, num_key_value_heads=1),
}


def examples() -> list[Tensor]:
    """Ten examples of two to nine words, the last of which ends them."""
    generator = torch.Generator().manual_seed(0)
    lengths = torch.randint(2, 10, (10,), generator=generator).tolist()
    words = [torch.randint(4, WORDS, (length,), generator=generator) for length in lengths]
    return [torch.cat([own[:-1], torch.tensor([END])]) for own in words]


def padded(rows: list[Tensor], value: int = 0, length: int | None = None) -> Tensor:
    width = length or max(map(len, rows))
    return torch.stack([torch.cat([row, row.new_full((width - len(row),), value)]) for row in rows])


def batch_of(rows: list[Tensor], length: int | None = None) -> dict[str, Tensor]:
    return {
        "input_ids": padded(rows, 0, length),
        "attention_mask": padded([torch.ones_like(r) for r in rows], 0, length),
    }


def run(net: nn.Module, batch: dict[str, Tensor]) -> object:
    return net(**batch)


def random_weights(model: nn.Module) -> nn.Module:
    torch.manual_seed(1)
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.3)
    return model.eval()


def compare(captured: Any, alone: Any, but: str = "") -> None:
    assert captured.layers() == alone.layers()
    for name in (layer for layer in alone if layer != but):
        assert captured.rows(name) == captured.seen(name) == alone.rows(name), name
        expected = alone[name].covariance()
        torch.testing.assert_close(captured[name].covariance(), expected, rtol=1e-5, atol=1e-5 * float(expected.max()))
    assert list(captured.norms) == list(alone.norms)
    for name, norm in alone.norms.items():
        assert captured.norms[name].rows == norm.rows
        torch.testing.assert_close(captured.norms[name].squares, norm.squares, rtol=1e-5, atol=1e-6)


@pytest.fixture
def statistics_of(running: Any, capture_with: Callable[..., Any]) -> Callable[..., Any]:
    capture = capture_with(rows=None, moments="input", norms=True, keep_rows=False)
    return lambda model, data: capture(running(model, run), data).statistics


@pytest.mark.parametrize("kind", CONFIGS)
def test_classifiers_see_what_each_example_shows_alone(kind: str, statistics_of: Callable[..., Any]) -> None:
    model = random_weights(AutoModelForSequenceClassification.from_config(CONFIGS[kind]))
    rows = examples()
    # The second batch is padded beyond its longest example, and none of the third is padded.
    batches = [batch_of(rows[:4]), batch_of(rows[4:9], 12), batch_of(rows[9:])]
    alone = statistics_of(model, [{"input_ids": row[None]} for row in rows])
    compare(statistics_of(model, batches), alone)
    tokens = sum(map(len, rows))
    assert {alone.rows(name) for name in alone} <= {tokens, len(rows)}


def given_masks(words: list[Tensor], labels: list[Tensor]) -> dict[str, Tensor]:
    return {
        "decoder_input_ids": padded(words, 7),
        "decoder_attention_mask": padded([torch.ones_like(own) for own in words]),
    }


def given_labels(words: list[Tensor], labels: list[Tensor]) -> dict[str, Tensor]:
    return {"labels": padded(labels, -100)}


def given_words(words: list[Tensor], labels: list[Tensor]) -> dict[str, Tensor]:
    return {"decoder_input_ids": padded(words)}


@pytest.mark.parametrize("give", [given_masks, given_labels, given_words])
@pytest.mark.parametrize("same_length", [True, False])
def test_decoders_with_words_of_their_own(
    give: Callable[..., dict[str, Tensor]], same_length: bool, statistics_of: Callable[..., Any]
) -> None:
    model = random_weights(T5ForConditionalGeneration(T5))
    sources = examples()[:4]
    labels = list(reversed(examples()))[:4]
    words = [torch.cat([torch.tensor([0]), own[:-1]]) for own in labels]
    alone = [
        {"input_ids": source[None], "decoder_input_ids": own[None]} for source, own in zip(sources, words, strict=True)
    ]
    width = max(map(len, labels))
    assert width >= max(map(len, sources))
    batch = {**batch_of(sources, width if same_length else width + 2), **give(words, labels)}
    captured, expected = statistics_of(model, [batch]), statistics_of(model, alone)
    # Behind the decoder only shapes tell whose words they are.
    compare(captured, expected, but="lm_head" if same_length else "")
    assert captured.rows("decoder.block.0.layer.2.DenseReluDense.wi") == sum(map(len, words))
    assert captured.rows("decoder.block.1.layer.1.EncDecAttention.k") == sum(map(len, sources))


def test_a_decoder_is_not_masked_in_batches_without_a_mask(statistics_of: Callable[..., Any]) -> None:
    model = random_weights(T5ForConditionalGeneration(T5))
    batch = {"input_ids": padded(examples()[:3]), "decoder_input_ids": torch.zeros(3, 5, dtype=torch.long)}
    assert statistics_of(model, [batch]).rows("decoder.block.0.layer.2.DenseReluDense.wi") == 15


def test_hooks_are_taken_off(statistics_of: Callable[..., Any]) -> None:
    model = random_weights(T5ForConditionalGeneration(T5))
    statistics_of(model, [{**batch_of(examples()[:2]), "decoder_input_ids": torch.ones(2, 3, dtype=torch.long)}])
    assert sum(len(part._forward_hooks) + len(part._forward_pre_hooks) for part in model.modules()) == 0


def test_shifted_masks() -> None:
    mask = torch.tensor([[1, 1, 1, 0, 0], [1, 1, 1, 1, 1], [0, 0, 1, 1, 1], [1, 0, 0, 0, 0], [0, 0, 0, 0, 0]])
    # The start, then the words before the last one, where they stand after the shift.
    expected = [[1, 1, 1, 0, 0], [1, 1, 1, 1, 1], [1, 0, 0, 1, 1], [1, 0, 0, 0, 0], [0, 0, 0, 0, 0]]
    assert shifted(mask).int().tolist() == expected
