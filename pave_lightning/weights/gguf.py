"""GGUF files as sources of models: their weights are dequantised once and kept as an ordinary model folder."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

from filelock import FileLock

from pave_lightning.errors import PaveError, foreign, listed
from pave_lightning.system.files import file_sha256, let_others_read, making_folder
from pave_lightning.weights.quiet import quiet_transformers

log = logging.getLogger("pave_lightning")

MAGIC = b"GGUF"
# In the folder: of which file it was made.
ORIGIN_FILE = "gguf.json"
# Raised when the folders change meaning, so that older ones are made anew.
FORMAT = 1


def gguf_folder(file: Path) -> Path:
    """A folder with the model of a GGUF file: configuration, safetensors in float32, tokenizer, generation settings.

    It is made once, by transformers and its ``gguf`` package, in the folder of Hugging Face's caches
    (``HF_ASSETS_CACHE``), and found again by the file's sha256. float32 holds every value of the file as transformers
    dequantises it; the folder takes 4 bytes a parameter.

    Args:
        file: a file of llama.cpp's format, quantised or not.

    Raises:
        PaveError: the package ``gguf`` is missing, the file is none or is broken, or transformers does not read its
            architecture.
    """
    from huggingface_hub import cached_assets_path

    with file.open("rb") as stream:
        if stream.read(4) != MAGIC:
            raise PaveError(f"{file} is no GGUF file: it does not begin with {MAGIC.decode()}; fetch it again")
    digest = file_sha256(file)
    folder: Path = cached_assets_path("pave-lightning", namespace="gguf", subfolder=f"{digest[:32]}-{FORMAT}") / "model"
    if folder.is_dir():
        return folder
    _check_package(file)
    with FileLock(folder.with_name(".lock")):
        if not folder.is_dir():  # or another process has made it meanwhile
            log.info("%s: its weights are dequantised and kept in %s", file, folder)
            with making_folder(folder) as unfinished:
                _write(file, unfinished)
                (unfinished / ORIGIN_FILE).write_text(json.dumps({"sha256": digest}))
    return folder


def _check_package(file: Path) -> None:
    from transformers.utils import is_gguf_available

    if not is_gguf_available():
        raise PaveError(f"{file}: to read it takes the package gguf; run: pip install 'pave-lightning[gguf]'")


def _write(file: Path, folder: Path) -> None:
    """Let transformers read a GGUF file, and write the model as one that was never quantised."""
    import torch
    from transformers import AutoConfig, AutoTokenizer

    advice = "fetch it again, or use the model that it was made of"
    with foreign(f"{file} could not be read", advice), quiet_transformers():
        config: Any = AutoConfig.from_pretrained(file.parent, gguf_file=file.name)
        kind = _model_class(config)
        read, found = kind.from_pretrained(
            file.parent, gguf_file=file.name, dtype=torch.float32, output_loading_info=True
        )
        tokenizer = AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name)
    lacking = sorted(found["missing_keys"])
    if lacking:
        raise PaveError(f"{file}: transformers finds {len(lacking)} weights not in it ({listed(lacking, 3)}); {advice}")
    # What was read is marked as quantised, which save_pretrained refuses; the same tensors in a new model are not.
    with torch.device("meta"):
        model: Any = kind._from_config(config)
    model.load_state_dict(read.state_dict(), assign=True)
    model.tie_weights()
    model.generation_config = read.generation_config
    with quiet_transformers():
        model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    for weights in folder.glob("*.safetensors"):
        let_others_read(weights)


def _model_class(config: Any) -> Any:
    """The class of transformers with the output layer that a GGUF file holds: a language model, wherever there is one.

    Raises:
        PaveError: there is none of that configuration.
    """
    import transformers

    named = next(iter(config.architectures or ()), None)
    if named is not None and hasattr(transformers, named):
        return getattr(transformers, named)
    for mapping in ("MODEL_FOR_CAUSAL_LM_MAPPING", "MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING", "MODEL_MAPPING"):
        known = getattr(transformers, mapping)
        if type(config) in known:
            return known[type(config)]
    raise PaveError(f"transformers has no model of the type {config.model_type}")
