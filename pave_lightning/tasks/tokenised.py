"""The rows of one task as tokens, kept in files that are named after everything that they depend on."""

from __future__ import annotations

import hashlib
import json
import tempfile
from functools import cached_property
from pathlib import Path
from typing import Any

import datasets
from transformers import PreTrainedTokenizerBase

from pave_lightning.errors import PaveError
from pave_lightning.recipe.schema import Task
from pave_lightning.tasks.copies import kept_copy
from pave_lightning.tasks.data import Split, changing, load_rows, quiet_datasets, split_fingerprint, split_title
from pave_lightning.tasks.labels import encode_labels
from pave_lightning.tasks.token_checks import token_findings

# Raise it when the tokenised files change their form, so that older ones are not read.
CACHE_FORMAT = 2


class TokenisedRows:
    """Tokenised rows of one task, made when they are first asked for and read memory-mapped from then on.

    Args:
        task: the task.
        tokenizer: the base model's tokenizer; it needs a padding token.
        seed: of the samples of rows.
        cache_dir: folder for Arrow copies of the raw and the tokenised rows.
        max_length: longest sequence in tokens; longer texts are cut, of a pair the longer text first.

    Raises:
        PaveError: the tokenizer has no padding token; later, when a split is read, all that is wrong with its data.
    """

    def __init__(
        self, task: Task, tokenizer: PreTrainedTokenizerBase, *, seed: int, cache_dir: str | Path, max_length: int
    ) -> None:
        if tokenizer.special_tokens_map.get("pad_token") is None:
            raise PaveError(
                f"task '{task.name}': the tokenizer {tokenizer.name_or_path or type(tokenizer).__name__} has no "
                "padding token, but rows of one batch must be padded to one length; set 'pad_token' in its "
                "tokenizer_config.json, for instance to its end-of-text token"
            )
        self.task = task
        self.tokenizer = tokenizer
        self.seed = seed
        self.cache_dir = Path(cache_dir)
        self.max_length = max_length
        self._datasets: dict[Split, datasets.Dataset] = {}

    def dataset(self, split: Split) -> datasets.Dataset:
        """The tokenised rows of a split with their labels and ``length`` in tokens; made now if they are not there.

        Raises:
            PaveError: the split cannot be read, or a text or label of it cannot be used.
        """
        if split not in self._datasets:
            self._datasets[split] = datasets.Dataset.from_file(str(self.file(split)))
        return self._datasets[split]

    def remarks(self, split: Split) -> list[str]:
        """What is worth saying of a split's tokens although it is no mistake, such as a vocabulary that hardly fits.

        Raises:
            PaveError: as `dataset`.
        """
        places = load_rows(self.task, split, seed=self.seed, cache_dir=self.cache_dir).places
        _, remarks = token_findings(self.dataset(split), self.tokenizer, places)
        return [f"{split_title(self.task, split)}: {remark}" for remark in remarks]

    def file(self, split: Split) -> Path:
        """The Arrow file of a split; made now if it is not there."""
        fingerprint = split_fingerprint(self.task, split)
        stem = f"{self.task.name}-{split}-{self._digest(split, fingerprint)[:32]}"
        return kept_copy(self.cache_dir / "tokenised", stem, lambda path: self._tokenise(split, path, fingerprint))

    def _tokenise(self, split: Split, path: Path, fingerprint: str) -> None:
        loaded = load_rows(self.task, split, seed=self.seed, cache_dir=self.cache_dir)
        if loaded.fingerprint != fingerprint:
            raise changing(self.task, split)
        rows = loaded.dataset.select_columns(list(dict.fromkeys([*self.task.text, self.task.label])))
        with quiet_datasets():
            tokenised = rows.map(
                self._encode,
                batched=True,
                remove_columns=rows.column_names,
                cache_file_name=str(path),
                load_from_cache_file=False,
                # Given, so that datasets need not pickle and hash the tokenizer.
                new_fingerprint=self._digest(split, fingerprint)[:32],
            )
        problems, _ = token_findings(tokenised, self.tokenizer, loaded.places)
        if problems:
            raise PaveError("\n".join(f"{split_title(self.task, split)}: {problem}" for problem in problems))

    def _encode(self, batch: dict[str, list[Any]]) -> dict[str, Any]:
        texts = [batch[name] for name in self.task.text]
        try:
            encoded = self.tokenizer(*texts, truncation=True, max_length=self.max_length, return_attention_mask=True)
        except Exception as error:
            # A class of its own the tokenizers library does not have.
            if type(error) is not Exception:
                raise
            name = self.tokenizer.name_or_path or type(self.tokenizer).__name__
            raise PaveError(
                f"task '{self.task.name}': the tokenizer {name} cannot encode some of the texts ({error}); "
                "its tokenizer.json is damaged or incomplete"
            ) from error
        tokens = dict(encoded)
        lengths = [len(ids) for ids in tokens["input_ids"]]
        return {**tokens, "labels": encode_labels(self.task, batch[self.task.label]), "length": lengths}

    @cached_property
    def _tokenizer_fingerprint(self) -> str:
        return tokenizer_fingerprint(self.tokenizer)

    def _digest(self, split: Split, fingerprint: str) -> str:
        parts = {
            "format": CACHE_FORMAT,
            "data": fingerprint,
            "text": self.task.text,
            "label": [self.task.label, self.task.kind, self.task.classes],
            "examples": getattr(self.task.examples, split),
            "seed": self.seed,
            "tokenizer": self._tokenizer_fingerprint,
            "max_length": self.max_length,
        }
        return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()


def tokenizer_fingerprint(tokenizer: PreTrainedTokenizerBase) -> str:
    """SHA-256 of all that decides how a tokenizer encodes; the same in every process and before and after use."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is not None:
        content = json.loads(backend.to_str())
        # State that each call leaves behind, no property of the tokenizer.
        content.update(truncation=None, padding=None)
    else:
        with tempfile.TemporaryDirectory() as folder:
            tokenizer.save_pretrained(folder)
            files = sorted(path for path in Path(folder).rglob("*") if path.is_file())
            content = {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in files}
    sides = [tokenizer.truncation_side, tokenizer.model_input_names]
    return hashlib.sha256(json.dumps([content, sides], sort_keys=True).encode()).hexdigest()
