"""Padding is no data: batches give the moments of their examples, each alone and not padded."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import (
    AutoModelForAudioClassification,
    AutoModelForSequenceClassification,
    BartConfig,
    BertConfig,
    GPT2Config,
    HubertConfig,
    LlamaConfig,
    T5Config,
    T5ForConditionalGeneration,
    Wav2Vec2Config,
    WhisperConfig,
)

from pave_lightning.callbacks.padding import convolved, shifted

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


CONVOLVED = {
    "conv_dim": (8, 8),
    "conv_kernel": (5, 3),
    "conv_stride": (3, 2),
    "num_feat_extract_layers": 2,
    "num_conv_pos_embeddings": 4,
    "num_conv_pos_embedding_groups": 2,
    # Other norms than those of layers let an example's padding change what is computed of it.
    "feat_extract_norm": "layer",
    "mask_time_prob": 0.0,
    "vocab_size": 12,
    "classifier_proj_size": 8,
}


@pytest.mark.parametrize("config", [Wav2Vec2Config, HubertConfig])
def test_speech_encoders_see_what_each_waveform_shows_alone(config: Any, running: Any, capture_with: Any) -> None:
    made = config(**SMALL, **CONVOLVED, do_stable_layer_norm=True)
    model = random_weights(AutoModelForAudioClassification.from_config(made))
    random = torch.Generator().manual_seed(0)
    lengths = [120, 77, 64, 103, 50]
    sounds = [torch.randn(length, generator=random) for length in lengths]

    def batch(rows: list[Tensor], length: int | None = None) -> dict[str, Tensor]:
        masks = padded([torch.ones(len(row), dtype=torch.long) for row in rows], 0, length)
        return {"input_values": padded(rows, 0, length), "attention_mask": masks}

    capture = capture_with(rows=None, moments="input", norms=True, keep_rows=False, convolutions=True)
    alone = capture(running(model, run), [batch([sound]) for sound in sounds]).statistics
    found = capture(running(model, run), [batch(sounds[:3]), batch(sounds[3:], 130)]).statistics
    head = next(name for name, _ in model.named_modules() if name.endswith("projector"))
    compare(found, alone)
    # By hand: each convolution makes (length - kernel) // stride + 1 of so many positions.
    first = sum((length - 5) // 3 + 1 for length in lengths)
    last = sum(((length - 5) // 3 + 1 - 3) // 2 + 1 for length in lengths)
    names = list(found)
    rows = {name: found.rows(name) for name in names}
    assert next(rows[name] for name in names if name.endswith("conv_layers.0.conv")) == first
    assert next(rows[name] for name in names if name.endswith("feature_projection.projection")) == last
    assert rows[head] == last


def test_of_spectra_that_are_padded_the_positions_beyond_do_not_count(running: Any, capture_with: Any) -> None:
    config = WhisperConfig(
        **SIDES, d_model=16, encoder_ffn_dim=24, decoder_ffn_dim=24, vocab_size=40, num_mel_bins=6,
        max_source_positions=10, classifier_proj_size=8, pad_token_id=0, bos_token_id=1, eos_token_id=2,
        decoder_start_token_id=1,
    )  # fmt: skip
    model = random_weights(AutoModelForAudioClassification.from_config(config))
    frames = [20, 13, 6]
    features = torch.randn(3, 6, 20, generator=torch.Generator().manual_seed(0))
    mask = (torch.arange(20) < torch.tensor(frames)[:, None]).long()
    seen: dict[str, Tensor] = {}
    layers = {"conv1": model.encoder.conv1, "fc1": model.encoder.layers[1].fc1}
    handles = [
        layer.register_forward_pre_hook(lambda module, args, name=name: seen.update({name: args[0].detach()}))
        for name, layer in layers.items()
    ]
    capture = capture_with(rows=None, moments="input", keep_rows=False, convolutions=True)
    step = running(model, lambda net, batch: net(batch["input_features"]))
    found = capture(step, [{"input_features": features, "attention_mask": mask}]).statistics
    for handle in handles:
        handle.remove()
    # Every second frame has a position, whose patch is centred on it.
    kept = [(count + 1) // 2 for count in frames]
    rows = torch.cat([own[:count] for own, count in zip(seen["fc1"], kept, strict=True)])
    moment = found["encoder.layers.1.fc1"]
    assert moment.rows == sum(kept)
    torch.testing.assert_close(moment.matrix, rows.T @ rows / len(rows), rtol=1e-4, atol=1e-4)
    wide = nn.functional.pad(seen["conv1"], (1, 1))
    patches = [wide[row, :, place : place + 3].flatten() for row, count in enumerate(frames) for place in range(count)]
    first = found["encoder.conv1"]
    assert first.rows == sum(frames)
    torch.testing.assert_close(first.matrix, torch.stack(patches).T @ torch.stack(patches) / first.rows)


@pytest.mark.parametrize("side", ["right", "left"])
@pytest.mark.parametrize(
    "layer",
    [
        nn.Conv1d(1, 1, 3),
        nn.Conv1d(1, 1, 4, stride=2, padding=1),
        nn.Conv1d(1, 1, 3, padding="same", dilation=2),
        nn.Conv1d(1, 1, 5, stride=1, padding=2),
        nn.Conv1d(1, 1, 2, dilation=3, padding="valid"),
    ],
    ids=str,
)
def test_masks_pass_through_convolutions(layer: nn.Conv1d, side: str) -> None:
    if side == "left" and layer.stride != (1,):
        pytest.skip("the grid of strides begins at the padding then")
    for length in range(8, 15):
        mask = torch.zeros(1, 14)
        mask[:, slice(length) if side == "right" else slice(14 - length, None)] = 1
        alone = layer(torch.zeros(1, 1, length)).shape[2]
        found = convolved(mask, layer)
        assert found is not None
        assert found.shape[1] == layer(torch.zeros(1, 1, 14)).shape[2]
        assert int(found.sum()) == alone
        assert bool(found[0, :alone].all() if side == "right" else found[0, -alone:].all())


def test_a_sequence_that_is_shorter_than_a_kernel_has_no_mask() -> None:
    assert convolved(torch.ones(2, 3), nn.Conv1d(1, 1, 5)) is None
