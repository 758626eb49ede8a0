"""What models write: the likeliest tokens, the same alone and in batches, bounded, and cut at stop strings."""

import random

import pytest
import torch
from transformers import GenerationConfig

from pave_lightning.tasks.decoding import cut_at, write
from pave_lightning.tasks.kinds.generative import left_padded

CAUSAL = ("llama", "gpt2", "opt", "bloom")
# The token that models name, and some that a task does, so that texts end at different lengths.
ENDS = {3, *range(7, 90, 9)}


def prompts(count=16):
    drawn = random.Random(1)
    return [[drawn.randrange(4, 92) for _ in range(drawn.randint(1, 9))] for _ in range(count)]


def as_inputs(rows):
    longest = max(map(len, rows))
    tokens = torch.tensor([row + [0] * (longest - len(row)) for row in rows])
    ids, mask = left_padded(tokens, torch.tensor([len(row) for row in rows]), 0)
    return {"input_ids": ids, "attention_mask": mask}


@torch.no_grad()
def by_hand(model, tokens, most, start=None):
    """The likeliest token, one after the other, without cache, padding or `generate`."""
    found = []
    while len(found) < most and not ENDS & set(found):
        if start is None:
            logits = model(input_ids=torch.tensor([tokens + found])).logits
        else:
            decoder = torch.tensor([[start, *found]])
            logits = model(input_ids=torch.tensor([tokens]), decoder_input_ids=decoder).logits
        found.append(int(logits[0, -1].argmax()))
    return found


def new_tokens(row):
    """The tokens up to the one that ends them."""
    found = row.tolist()
    last = next((place for place, token in enumerate(found) if token in ENDS), len(found))
    return found[: last + 1]


@pytest.mark.parametrize("family", CAUSAL)
@pytest.mark.parametrize("size", [1, 16])
def test_tokens_are_the_likeliest_ones_whatever_the_batch(language_model, writing_tokenizer, family, size):
    model, rows = language_model(family), prompts()
    expected = [by_hand(model, row, 8) for row in rows]
    found = []
    for start in range(0, len(rows), size):
        written = write(model, as_inputs(rows[start : start + size]), writing_tokenizer, most=8, ends=ENDS)
        found += [new_tokens(row) for row in written.tokens]
        assert not written.broken.any()
    assert found == expected
    assert len({tuple(row) for row in found}) > 4  # or else the model writes the same whatever it reads
    assert len(set(map(len, found))) > 1 or family == "bloom"  # which repeats itself


@pytest.mark.parametrize("family", ["t5", "bart"])
def test_decoders_write_the_likeliest_tokens_too(language_model, writing_tokenizer, family):
    model, rows = language_model(family), prompts(6)
    longest = max(map(len, rows))
    inputs = {
        "input_ids": torch.tensor([row + [0] * (longest - len(row)) for row in rows]),
        "attention_mask": torch.tensor([[1] * len(row) + [0] * (longest - len(row)) for row in rows]),
    }
    model.generation_config.forced_eos_token_id = None
    written = write(model, inputs, writing_tokenizer, most=6, ends=ENDS)
    assert [new_tokens(row) for row in written.tokens] == [by_hand(model, row, 6, start=0) for row in rows]


def test_what_a_model_says_of_sampling_is_left_aside_and_stays(language_model, writing_tokenizer):
    model, rows = language_model("llama"), prompts(4)
    plain = write(model, as_inputs(rows), writing_tokenizer, most=8)
    own = GenerationConfig(do_sample=True, temperature=9.0, repetition_penalty=5.0, max_length=3, num_beams=2)
    model.generation_config = own
    again = write(model, as_inputs(rows), writing_tokenizer, most=8)
    assert torch.equal(again.tokens, plain.tokens)
    assert model.generation_config is own


def test_generation_ends_at_the_most_tokens_and_at_named_ones(language_model, writing_tokenizer):
    model = language_model("llama")
    model.config.eos_token_id = None
    model.generation_config.eos_token_id = None
    inputs = as_inputs([[5, 6, 7]])
    endless = write(model, inputs, writing_tokenizer, most=12)
    assert endless.tokens.shape == (1, 12)
    end = int(endless.tokens[0, 4])
    stopped = write(model, inputs, writing_tokenizer, most=12, ends=[end])
    assert stopped.tokens.shape[1] == endless.tokens[0].tolist().index(end) + 1


def test_stop_strings_cut_the_text_and_end_the_work(language_model, writing_tokenizer):
    model, rows = language_model("llama"), prompts(8)
    whole = write(model, as_inputs(rows), writing_tokenizer, most=12)
    stop = [whole.texts[0].split()[2], "w no such word"]
    cut = write(model, as_inputs(rows), writing_tokenizer, most=12, stop=stop)
    assert cut.texts == [cut_at(text, stop) for text in whole.texts]
    assert cut.texts[0] != whole.texts[0]
    alone = write(model, as_inputs(rows[:1]), writing_tokenizer, most=12, stop=stop)
    assert alone.tokens.shape[1] == 3
    assert alone.texts[0] == cut.texts[0]
    # What stands in the prompt ends nothing.
    prompt = writing_tokenizer.decode(rows[0])
    unstopped = write(model, as_inputs(rows[:1]), writing_tokenizer, most=12, stop=[prompt])
    assert unstopped.texts[0] == whole.texts[0]


def test_prompts_with_logits_that_are_no_numbers_are_told(language_model, writing_tokenizer):
    model = language_model("llama")
    with torch.no_grad():
        model.get_input_embeddings().weight[50] = float("nan")
    written = write(model, as_inputs([[5, 6], [50, 6]]), writing_tokenizer, most=3)
    assert written.broken.tolist() == [False, True]
