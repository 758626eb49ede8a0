"""The longest sequence that a model says it can read is the longest that it can read."""

import pytest
import torch
import transformers as hf

from pave_lightning.weights import Architecture

ROWS = 40
SIZES = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 24, "vocab_size": 50}
TABLE = {**SIZES, "max_position_embeddings": ROWS}
SHORT = {"n_embd": 16, "n_layer": 1, "n_head": 2, "vocab_size": 50, "n_positions": ROWS, "pad_token_id": 0}
BART = {f"{part}_{what}": size for part in ("encoder", "decoder") for what, size in (("layers", 1), ("ffn_dim", 24))}
FAMILIES = {
    "bert": (hf.BertConfig(**TABLE), ROWS),
    "roberta": (hf.RobertaConfig(**TABLE), ROWS - 2),
    "camembert": (hf.CamembertConfig(**TABLE), ROWS - 2),
    "mpnet": (hf.MPNetConfig(**TABLE), ROWS - 2),
    "data2vec": (hf.Data2VecTextConfig(**TABLE), ROWS - 2),
    "i-bert": (hf.IBertConfig(**TABLE), ROWS - 2),
    "distilbert": (
        hf.DistilBertConfig(dim=16, n_layers=1, n_heads=2, hidden_dim=24, vocab_size=50, max_position_embeddings=ROWS),
        ROWS,
    ),
    "albert": (hf.AlbertConfig(**TABLE, embedding_size=8), ROWS),
    "nystromformer": (hf.NystromformerConfig(**TABLE), ROWS),
    "gpt2": (hf.GPT2Config(**SHORT), ROWS),
    "gpt": (hf.OpenAIGPTConfig(**SHORT), ROWS),
    "gpt-j": (hf.GPTJConfig(**SHORT, rotary_dim=4), ROWS),
    "ctrl": (hf.CTRLConfig(**SHORT, dff=24), ROWS),
    "opt": (hf.OPTConfig(**TABLE, ffn_dim=24, word_embed_proj_dim=16, pad_token_id=1), ROWS),
    "bart": (
        hf.BartConfig(
            d_model=16,
            encoder_attention_heads=2,
            decoder_attention_heads=2,
            vocab_size=50,
            max_position_embeddings=ROWS,
            **BART,
        ),
        ROWS,
    ),
    "mpt": (hf.MptConfig(d_model=16, n_layers=1, n_heads=2, vocab_size=50, max_seq_len=ROWS), ROWS),
    # No table: rotary, relative or linear positions have no end.
    "llama": (hf.LlamaConfig(**TABLE, pad_token_id=0), None),
    "esm": (hf.EsmConfig(**TABLE, pad_token_id=1, position_embedding_type="rotary"), None),
    "bloom": (hf.BloomConfig(hidden_size=16, n_layer=1, n_head=2, vocab_size=50, pad_token_id=0), None),
    "xlnet": (hf.XLNetConfig(d_model=16, n_layer=1, n_head=2, d_inner=24, vocab_size=50), None),
    "t5": (
        hf.T5Config(
            d_model=16,
            d_kv=8,
            num_layers=1,
            num_heads=2,
            d_ff=24,
            vocab_size=50,
            n_positions=ROWS,
            decoder_start_token_id=0,
        ),
        None,
    ),
    "deberta-v3": (
        hf.DebertaV2Config(
            **TABLE,
            relative_attention=True,
            position_biased_input=False,
            pos_att_type=["p2c", "c2p"],
            position_buckets=8,
        ),
        None,
    ),
}


@pytest.mark.parametrize("family", FAMILIES)
def test_the_longest_sequence_is_the_longest_that_can_be_read(family, tmp_path):
    config, longest = FAMILIES[family]
    config.save_pretrained(tmp_path)
    assert Architecture.of_folder(tmp_path).positions == longest
    model = hf.AutoModelForSequenceClassification.from_config(config).eval()

    def read(length):
        ids = torch.full((1, length), 5)
        ids[0, -1] = config.eos_token_id if config.is_encoder_decoder else 5
        with torch.no_grad():
            return model(input_ids=ids, attention_mask=torch.ones_like(ids)).logits

    assert read(4 * ROWS if longest is None else longest).isfinite().all()
    if longest is not None:
        with pytest.raises((IndexError, RuntimeError, ValueError)):
            read(longest + 1)


def test_what_a_base_without_table_was_made_for_is_known(tmp_path):
    FAMILIES["llama"][0].save_pretrained(tmp_path)
    assert Architecture.of_folder(tmp_path).intended_positions == ROWS
