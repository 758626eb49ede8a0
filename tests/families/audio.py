"""Speech models of transformers."""

import torch
import transformers as hf
from torch import Tensor

from families.pretrained import Pretrained

CONVOLVED = {
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 32,
    "conv_dim": (8, 8),
    "conv_kernel": (5, 3),
    "conv_stride": (3, 2),
    "num_feat_extract_layers": 2,
    "num_conv_pos_embeddings": 8,
    "num_conv_pos_embedding_groups": 4,
    "classifier_proj_size": 8,
    "vocab_size": 12,
}
STACKS = {
    "d_model": 16,
    "encoder_layers": 2,
    "decoder_layers": 2,
    "encoder_attention_heads": 2,
    "decoder_attention_heads": 2,
    "encoder_ffn_dim": 32,
    "decoder_ffn_dim": 32,
    "vocab_size": 60,
    "num_mel_bins": 6,
    "max_source_positions": 10,
    "max_target_positions": 12,
    "classifier_proj_size": 8,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "decoder_start_token_id": 1,
}


def sounds(seed: int) -> dict[str, Tensor]:
    """Waveforms of one length."""
    return {"input_values": torch.randn(3, 120, generator=torch.Generator().manual_seed(seed))}


def spectra(seed: int) -> dict[str, Tensor]:
    """Log-mel spectra."""
    return {"input_features": torch.randn(3, 6, 20, generator=torch.Generator().manual_seed(seed))}


def transcribed(seed: int) -> dict[str, Tensor]:
    """Log-mel spectra and the words so far."""
    random = torch.Generator().manual_seed(seed)
    return {**spectra(seed), "decoder_input_ids": torch.randint(3, 60, (3, 5), generator=random)}


def wav2vec2() -> hf.Wav2Vec2Config:
    return hf.Wav2Vec2Config(**CONVOLVED)


def whisper() -> hf.WhisperConfig:
    return hf.WhisperConfig(**STACKS)


BOTH = ({}, {})
FAMILIES = [
    Pretrained(
        "wav2vec 2.0", wav2vec2, "Wav2Vec2Model", "Wav2Vec2ForSequenceClassification", sounds, "wav2vec2", heads=()
    ),
    Pretrained(
        "wav2vec 2.0, transcription",
        wav2vec2,
        "Wav2Vec2Model",
        "Wav2Vec2ForCTC",
        sounds,
        "wav2vec2",
        heads=(),
        sizes=BOTH,
    ),
    Pretrained(
        "HuBERT",
        lambda: hf.HubertConfig(**CONVOLVED),
        "HubertModel",
        "HubertForSequenceClassification",
        sounds,
        "hubert",
        heads=(),
        slow=True,
    ),
    Pretrained(
        "Whisper",
        whisper,
        "WhisperModel",
        "WhisperForConditionalGeneration",
        transcribed,
        heads=(),
        sizes=BOTH,
    ),
    Pretrained(
        "Whisper, encoder",
        whisper,
        "WhisperModel",
        "WhisperForAudioClassification",
        spectra,
        heads=("projector", "classifier", "layer_weights"),
    ),
]
