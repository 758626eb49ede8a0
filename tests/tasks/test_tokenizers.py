"""Tokenizers of model folders: what must be there, and what pads."""

import json
import shutil
import sys

import pytest
from transformers import BertConfig, GPT2Config, LlamaConfig, RobertaConfig, T5Config, XLNetConfig

from pave_lightning.errors import PaveError
from pave_lightning.tasks.tokenizers import load_tokenizer, padding_id, padding_note, set_padding
from pave_lightning.weights.empty_models import empty_model, read_config
from pave_lightning.weights.tokenizer_files import has_tokenizer

SMALL = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
CONFIGS = {
    "bert": lambda: BertConfig(**SMALL, vocab_size=100),
    "roberta": lambda: RobertaConfig(**SMALL, vocab_size=100),
    "gpt2": lambda: GPT2Config(vocab_size=100, n_embd=16, n_layer=1, n_head=2),
    "t5": lambda: T5Config(vocab_size=100),
    "llama": lambda: LlamaConfig(**SMALL, vocab_size=100),
    "xlnet": lambda: XLNetConfig(vocab_size=100, d_model=16, n_layer=1, n_head=2),
}


@pytest.fixture
def model(tmp_path):
    """Write a folder with the configuration of a family, and with files beside it."""

    def write(family="bert", files=None, **config):
        folder = tmp_path / f"model-{len(list(tmp_path.iterdir()))}"
        made = CONFIGS[family]()
        for name, value in config.items():
            setattr(made, name, value)
        made.save_pretrained(folder)
        for name, text in (files or {}).items():
            (folder / name).write_text(text if isinstance(text, str) else json.dumps(text))
        return folder

    return write


def with_words(folder, tokenizer, **settings):
    """The tokenizer of the words w0 to w95, with some settings changed; those that are None are taken away."""
    tokenizer.save_pretrained(folder)
    path = folder / "tokenizer_config.json"
    changed = {**json.loads(path.read_text()), **settings}
    path.write_text(json.dumps({name: value for name, value in changed.items() if value is not None}))
    return folder


@pytest.mark.parametrize("settings", [None, {"model_max_length": 128}], ids=["no file", "settings alone"])
@pytest.mark.parametrize("family", CONFIGS)
def test_a_folder_without_a_vocabulary(family, settings, model):
    folder = model(family, {} if settings is None else {"tokenizer_config.json": settings})
    with pytest.raises(PaveError) as caught:
        load_tokenizer(folder)
    text = str(caught.value)
    assert str(folder) in text
    assert "tokenizer.json" in text
    assert "\n" not in text


@pytest.mark.parametrize(
    ("family", "files"),
    [
        ("bert", {"vocab.txt": ""}),
        ("bert", {"vocab.txt": "[PAD]\n[UNK]\n[CLS]\n[SEP]\n[MASK]\n"}),
        ("roberta", {"vocab.json": {}, "merges.txt": "#version: 0.2\n"}),
        ("gpt2", {"vocab.json": {"<|endoftext|>": 0}, "merges.txt": "#version: 0.2\n"}),
    ],
)
def test_an_empty_vocabulary(family, files, model):
    with pytest.raises(PaveError, match=r"vocabulary of its tokenizer is empty|no tokenizer could be loaded"):
        load_tokenizer(model(family, files))


def test_letters_without_their_merges(model):
    letters = {letter: index for index, letter in enumerate("abcdefghijklmnopqrstuvwxyz")}
    with pytest.raises(PaveError, match=r"merges.txt is missing"):
        load_tokenizer(model("gpt2", {"vocab.json": letters}))


@pytest.mark.parametrize("family", ["t5", "xlnet", "llama"])
def test_pieces_that_need_a_package(family, model):
    name = "tokenizer.model" if family == "llama" else "spiece.model"
    with pytest.raises(PaveError, match="no tokenizer could be loaded") as caught:
        load_tokenizer(model(family, {name: "no pieces"}))
    assert f"{name} alone needs sentencepiece" in str(caught.value)


@pytest.mark.parametrize(
    "text", ["", "{", "{}", "[]", "null", '{"version": "1.0", "model": {"type": "WordPiece"}}'], ids=str
)
def test_a_broken_file(text, model):
    with pytest.raises(PaveError, match="tokenizer"):
        load_tokenizer(model("bert", {"tokenizer.json": text}))


@pytest.mark.parametrize("text", ["{", "[]", "7"])
def test_broken_settings(text, model, tiny_tokenizer):
    folder = with_words(model(), tiny_tokenizer)
    (folder / "tokenizer_config.json").write_text(text)
    with pytest.raises(PaveError, match="no tokenizer could be loaded"):
        load_tokenizer(folder)


def test_code_of_a_folder_is_not_run_and_nobody_is_asked(model, tiny_tokenizer, monkeypatch):
    class Asked:
        def readline(self):
            raise AssertionError("a question was asked")

    monkeypatch.setattr(sys, "stdin", Asked())
    code = {"auto_map": {"AutoTokenizer": ["mine.Mine", None]}, "tokenizer_class": "Mine"}
    folder = with_words(model(), tiny_tokenizer, **code)
    (folder / "mine.py").write_text("raise SystemExit('it was run')")
    assert load_tokenizer(folder).get_vocab() == tiny_tokenizer.get_vocab()
    (folder / "tokenizer.json").unlink()
    with pytest.raises(PaveError, match="tokenizer"):
        load_tokenizer(folder)


def test_an_expert_without_tokenizer_files_has_the_bases(model, tiny_tokenizer, base_folder):
    expert = model()
    assert not has_tokenizer(expert)
    assert load_tokenizer(expert, base_folder).get_vocab() == tiny_tokenizer.get_vocab()
    (expert / "tokenizer_config.json").write_text("{}")
    assert has_tokenizer(expert)
    with pytest.raises(PaveError, match="holds no vocabulary"):
        load_tokenizer(expert, base_folder)


def test_an_adapter_may_have_its_own(tmp_path, tiny_tokenizer, base_folder):
    tiny_tokenizer.save_pretrained(tmp_path)
    (tmp_path / "adapter_config.json").write_text("{}")
    assert len(load_tokenizer(tmp_path, base_folder)) == 100


def test_a_tokenizer_that_pads_is_left_as_it_is(base_folder):
    tokenizer = load_tokenizer(base_folder)
    assert (tokenizer.pad_token, tokenizer.padding_side) == ("[PAD]", "right")
    assert padding_note(tokenizer) is None


def test_the_end_of_text_pads_where_nothing_else_does(model, tiny_tokenizer, tmp_path):
    folder = with_words(model("gpt2"), tiny_tokenizer, pad_token=None, eos_token="[SEP]")
    tokenizer = load_tokenizer(folder)
    assert (tokenizer.pad_token, tokenizer.pad_token_id) == ("[SEP]", 3)
    assert "batches are padded with its end-of-text token [SEP]" in padding_note(tokenizer)
    classifier = empty_model(folder, "AutoModelForSequenceClassification")
    assert classifier.config.pad_token_id is None
    set_padding(classifier, folder)
    assert classifier.config.pad_token_id == 3
    assert tokenizer("w1 w2")["input_ids"] == tiny_tokenizer("w1 w2")["input_ids"]
    shutil.copytree(folder, tmp_path / "saved")
    tokenizer.save_pretrained(tmp_path / "saved")
    assert load_tokenizer(tmp_path / "saved").pad_token == "[SEP]"


def test_nothing_that_could_pad(model, tiny_tokenizer):
    folder = with_words(model("gpt2", eos_token_id=None, bos_token_id=None), tiny_tokenizer, pad_token=None)
    with pytest.raises(PaveError, match="neither a padding token nor an end-of-text token"):
        load_tokenizer(folder)


def test_the_token_that_the_configuration_names(model, tiny_tokenizer):
    folder = with_words(model("llama", pad_token_id=1), tiny_tokenizer, pad_token=None, eos_token="[SEP]")
    tokenizer = load_tokenizer(folder)
    assert tokenizer.pad_token == "[UNK]"
    assert padding_id(read_config(folder), tokenizer) == 1


@pytest.mark.parametrize(("named", "found"), [(7, 7), (None, 0), (-1, 0), (100, 0)])
def test_batches_are_filled_with_the_models_token(named, found, model, tiny_tokenizer):
    folder = with_words(model("llama", pad_token_id=named), tiny_tokenizer)
    tokenizer = load_tokenizer(folder)
    assert tokenizer("w3 w5")["input_ids"] == [2, 7, 9, 3], "an ordinary word stays one"
    assert padding_id(read_config(folder), tokenizer) == found


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize(("family", "exact"), [("bert", "right"), ("llama", "right"), ("xlnet", "left")])
def test_the_side_is_the_one_that_is_exact(family, exact, side, model, tiny_tokenizer):
    folder = with_words(model(family), tiny_tokenizer, padding_side=side)
    assert load_tokenizer(folder).padding_side == exact
