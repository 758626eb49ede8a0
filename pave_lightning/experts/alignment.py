"""Experts with one vocabulary: the rows of their tables matched by token, whatever numbers their tokens have."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from pave_lightning.errors import PaveError, counted, listed, shortened
from pave_lightning.experts.vocabularies import Common
from pave_lightning.experts.vocabulary import table_rows
from pave_lightning.system.files import read_json
from pave_lightning.tasks.tokenizers import load_tokenizer
from pave_lightning.tasks.union_tokenizer import union_problems, write_union_tokenizer, wrong_numbers
from pave_lightning.weights import Architecture, Checkpoint, ShardWriter
from pave_lightning.weights.adapters import ADAPTER_FOLDER
from pave_lightning.weights.checkpoint import INDEX_FILE, StoredTensor
from pave_lightning.weights.empty_models import empty_model
from pave_lightning.weights.tokenizer_files import TOKENIZER_FILES

# A row of a table that an expert has no row for.
ABSENT = -1
_TOKEN_KEY = re.compile(r"(.*_)?token_(id|ids|index)")


@dataclass(frozen=True)
class CommonTokens:
    """The tokens that a merged model has.

    Attributes:
        base: the base's tokens and their numbers, which are rows of its table.
        first: rows of the base's table; new tokens come behind it.
        new: the tokens of experts that are taken in, in order.
    """

    base: Mapping[str, int]
    first: int
    new: tuple[str, ...] = ()

    @property
    def rows(self) -> int:
        """Rows of the merged model's table."""
        return self.first + len(self.new)

    @property
    def new_numbers(self) -> dict[str, int]:
        """The new tokens and their rows."""
        return {token: self.first + place for place, token in enumerate(self.new)}

    @property
    def numbers(self) -> dict[str, int]:
        """All tokens and their rows."""
        return {**self.base, **self.new_numbers}

    def sources(self, own: Mapping[str, int]) -> Tensor:
        """For each row, the row of an expert's table that is the same token's, or `ABSENT`; int64, shape ``(rows,)``.

        Args:
            own: the expert's tokens and their numbers.

        Example:
            >>> CommonTokens({"a": 0, "b": 1}, first=3, new=("z",)).sources({"b": 0, "z": 7}).tolist()
            [-1, 0, -1, 7]
        """
        found = torch.full((self.rows,), ABSENT)
        for token, row in self.numbers.items():
            if token in own:
                found[row] = own[token]
        return found

    def dropped(self, own: Mapping[str, int]) -> list[str]:
        """The tokens of an expert that have no row."""
        known = self.numbers
        return [token for token in own if token not in known]


def common_tokens(
    vocabulary: Common, base: Mapping[str, int], rows: int, experts: Mapping[str, Mapping[str, int]]
) -> CommonTokens:
    """The tokens of a merged model.

    Args:
        vocabulary: ``base_rows``: those of the base; ``union``: those of the experts besides, in the order of the
            tasks, of each in the order of their numbers.
        base: the base's tokens and their numbers.
        rows: rows of its table.
        experts: the same of each task's expert.
    """
    if vocabulary == "base_rows":
        return CommonTokens(base, rows)
    new: dict[str, None] = {}
    for own in experts.values():
        new.update(dict.fromkeys(token for token in sorted(own, key=own.__getitem__) if token not in base))
    return CommonTokens(base, rows, tuple(new))


def alignment_notes(tokens: CommonTokens, experts: Mapping[str, Mapping[str, int]]) -> Iterator[str]:
    """What to tell of how the rows of experts are matched, a line for each whose tokens are not those in common.

    Args:
        tokens: the tokens in common.
        experts: the tokens of each task's expert and their numbers.
    """
    numbers = tokens.numbers
    for task, own in experts.items():
        moved = sum(numbers.get(token, number) != number for token, number in own.items())
        dropped = tokens.dropped(own)
        lacking = sum(token not in own for token in tokens.base)
        told = [f"{counted(moved, 'token')} with another number"] if moved else []
        told += [f"{counted(len(dropped), 'token')} dropped ({_shown(dropped)})"] if dropped else []
        told += [f"{counted(lacking, 'token')} of the base missing, whose rows count as unchanged"] if lacking else []
        if told:
            yield f"task '{task}': rows of its expert are matched by token: {', '.join(told)}"
    if tokens.new:
        yield f"the merged model has {counted(len(tokens.new), 'new token')}: {_shown(tokens.new)}"


def _shown(tokens: Sequence[str]) -> str:
    return listed([shortened(repr(token), 30) for token in tokens], 3)


@dataclass(frozen=True)
class Alignment:
    """Finished experts of one base, and the vocabulary that they are to have in common.

    Attributes:
        vocabulary: which tokens are kept.
        base: the base's checkpoint.
        architecture: its architecture.
        experts: folder of each task's expert, a whole model.
    """

    vocabulary: Common
    base: Checkpoint
    architecture: Architecture
    experts: Mapping[str, Path]
    _made: dict[str, Any] = field(default_factory=dict, repr=False, compare=False)

    @property
    def tokens(self) -> CommonTokens:
        """The tokens in common."""
        if "tokens" not in self._made:
            rows = table_rows(self.base, self.architecture)
            if rows is None:
                raise PaveError(f"vocabulary: {self.vocabulary}: the base has no table with a row for each token")
            known = load_tokenizer(self.base.folder).get_vocab()
            own = {task: self.own_tokens(task) for task in self.experts}
            self._made["tokens"] = common_tokens(self.vocabulary, known, rows, own)
        tokens: CommonTokens = self._made["tokens"]
        return tokens

    def own_tokens(self, task: str) -> Mapping[str, int]:
        """The tokens of a task's expert and their numbers, which are rows of its table."""
        found: dict[str, int] = load_tokenizer(self.experts[task], self.base.folder).get_vocab()
        return found

    def differs(self, task: str) -> bool:
        """Whether the rows of a task's expert are not those of the common vocabulary already."""
        return bool(self.tokens.new) or dict(self.own_tokens(task)) != dict(self.tokens.base)

    def write(self, task: str, folder: Path) -> None:
        """Write a task's expert with the common vocabulary: tables, tokenizer, numbers of tokens in its configuration.

        Rows of tokens that the expert has not are the base's, so that it says nothing about them. Rows of new tokens
        are the mean of the rows that the experts have which know the token, in every expert alike, so that no merge
        method and no scale changes them. (Task vectors of new tokens would begin at the mean of the base's rows; in
        their average it cancels out.)

        Args:
            task: the task.
            folder: an existing, empty folder.

        Raises:
            PaveError: the tokenizers cannot be joined.
        """
        place = self.experts[task]
        expert = self._checkpoint(task)
        tables = {table.stored.name: table for table in self._tables(task)}
        writer = ShardWriter(folder)
        for name, stored in expert.stored():
            writer.add(name, self._aligned(task, tables[name]) if name in tables else expert.read(stored))
        writer.close()
        own = {number: token for token, number in self.own_tokens(task).items()}
        for file in sorted(place.iterdir()):
            if file.suffix == ".json" and file.name in ("config.json", "generation_config.json"):
                settings = self._renumbered(read_json(file), read_json(self.base.folder / "config.json"), own)
                if file.name == "config.json":
                    _set_rows(settings, self.tokens.rows)
                (folder / file.name).write_text(json.dumps(settings, indent=2))
            elif _is_carried(file):
                shutil.copyfile(file, folder / file.name)
        if (place / ADAPTER_FOLDER).is_dir():
            shutil.copytree(place / ADAPTER_FOLDER, folder / ADAPTER_FOLDER)
        self._write_tokenizer(folder)

    def _write_tokenizer(self, folder: Path) -> None:
        base = load_tokenizer(self.base.folder)
        if not self.tokens.new:
            base.save_pretrained(folder)
            return
        experts = {task: load_tokenizer(place, self.base.folder) for task, place in self.experts.items()}
        for problem in union_problems(base, experts, self.tokens.new):
            raise PaveError(problem)
        write_union_tokenizer(base, experts.values(), self.tokens.new_numbers, folder)
        wrong = wrong_numbers(load_tokenizer(folder), self.tokens.numbers)
        if wrong is not None:
            raise PaveError(f"vocabulary: union: {wrong}; use vocabulary: base_rows")

    def _checkpoint(self, task: str) -> Checkpoint:
        return self.architecture.checkpoint(self.experts[task])

    def _tables(self, task: str) -> Iterator[_Table]:
        """The stored tensors of an expert that have one row a token."""
        expert = self._checkpoint(task)
        rows = table_rows(expert, self.architecture)
        for name in self.architecture.token_embeddings:
            for held in (expert.backbone, expert.copies):
                if name in held:
                    yield _Table(name, held[name], self.base.backbone.get(name))
        start = self.architecture.start
        names = output_tables(empty_model(self.experts[task]))
        tied = next((name for name in self.architecture.token_embeddings if f"{start}{name}" in names), None)
        for name in names:
            inside = name.removeprefix(start)
            if inside in self.architecture.token_embeddings:
                continue
            stored = expert.head.get(name) or expert.backbone.get(inside)
            if stored is not None and stored.shape[:1] == (rows,):
                shared = self.base.backbone.get(tied) if tied is not None and len(stored.shape) > 1 else None
                yield _Table(name, stored, self.base.head.get(name) or self.base.backbone.get(inside) or shared)

    def _aligned(self, task: str, table: _Table) -> Tensor:
        """A table of an expert with the common rows, in its dtype."""
        values = Checkpoint.read(table.stored)
        sources = self.tokens.sources(self.own_tokens(task))[: self.tokens.first]
        there = sources != ABSENT
        of_base = None if table.base is None else Checkpoint.read(table.base)
        # A table that the base lacks is the expert's alone, and so are its rows of tokens that the expert lacks.
        filled = values.float().mean(dim=0).expand(len(sources), *values.shape[1:]) if of_base is None else of_base
        result = filled.to(values.dtype).clone()
        result[there] = values[sources[there]]
        return torch.cat([result, self._new_rows(table.name).to(values.dtype)]) if self.tokens.new else result

    def _new_rows(self, name: str) -> Tensor:
        """The rows of new tokens in a table, float64: of each token the mean over the experts that have it."""
        if name not in self._made:
            total, count = torch.zeros(()), torch.zeros(len(self.tokens.new), dtype=torch.float64)
            for task in self.experts:
                sources = self.tokens.sources(self.own_tokens(task))[self.tokens.first :]
                there = sources != ABSENT
                table = next((found for found in self._tables(task) if found.name == name), None)
                if table is None or not bool(there.any()):
                    continue
                values = Checkpoint.read(table.stored).double()
                rows = torch.zeros(len(sources), *values.shape[1:], dtype=torch.float64)
                rows[there] = values[sources[there]]
                total, count = total + rows, count + there.double()
            if not bool((count > 0).all()):
                raise PaveError(f"vocabulary: union: no expert has rows of {name} for some of the new tokens")
            self._made[name] = total / count.reshape(-1, *[1] * (total.dim() - 1))
        found: Tensor = self._made[name]
        return found

    def _renumbered(self, settings: Any, of_base: Any, own: Mapping[int, str]) -> Any:
        """Settings in which the numbers of tokens are the common ones; of tokens without one, the base's setting."""
        if not isinstance(settings, dict):
            return settings
        numbers = self.tokens.numbers
        found = {}
        for key, value in settings.items():
            beside = of_base.get(key) if isinstance(of_base, dict) else None
            if _TOKEN_KEY.fullmatch(key) and isinstance(value, int | list):
                many = value if isinstance(value, list) else [value]
                now = [numbers.get(own.get(number, "")) for number in many]
                found[key] = beside if None in now else now if isinstance(value, list) else now[0]
            else:
                found[key] = self._renumbered(value, beside, own)
        return found


@dataclass(frozen=True)
class _Table:
    """A stored tensor with one row a token: its name in the model, where it is, and where the base has it."""

    name: str
    stored: StoredTensor
    base: StoredTensor | None


def output_tables(model: nn.Module) -> list[str]:
    """Names of the weights that give each token its score, weight and bias of the output layer, tied names too."""
    reader: Any = getattr(model, "get_output_embeddings", None)
    layer = reader() if reader is not None else None
    own = {id(parameter) for parameter in layer.parameters()} if isinstance(layer, nn.Module) else set()
    return [name for name, parameter in model.named_parameters(remove_duplicate=False) if id(parameter) in own]


def _set_rows(settings: dict[str, Any], rows: int) -> None:
    """Let a configuration name another number of rows, where it names one: at the top or in the part about text."""
    for part in (settings, *(value for value in settings.values() if isinstance(value, dict))):
        if "vocab_size" in part:
            part["vocab_size"] = rows
            return


def _is_carried(file: Path) -> bool:
    """Whether a file of an expert belongs to its aligned form: neither weights nor a tokenizer's, nor a record."""
    if not file.is_file() or file.suffix not in (".json", ".jinja", ".txt") or file.name == INDEX_FILE:
        return False
    return file.name != "manifest.json" and not any(file.match(pattern) for pattern in TOKENIZER_FILES)
