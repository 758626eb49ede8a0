"""What is wrong with tokenizers and token embeddings, and what to know of them before a run."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING

from pave_lightning.errors import PaveError
from pave_lightning.experts.alignment import alignment_notes, common_tokens
from pave_lightning.experts.vocabulary import differing_tokens, expert_notes, row_problems, table_rows, token_rows
from pave_lightning.pipeline.bases import existing_folder, folder_of_base
from pave_lightning.recipe.schema import Recipe
from pave_lightning.tasks.task import Task
from pave_lightning.tasks.tokenizers import load_tokenizer, padding_note
from pave_lightning.tasks.union_tokenizer import joined_problems, union_problems
from pave_lightning.weights import Architecture, Checkpoint
from pave_lightning.weights.adapters import ADAPTER_CONFIG

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


def token_problems(recipe: Recipe) -> Iterator[str]:
    """What is wrong with the tokenizers of the base and of the experts that exist already.

    Args:
        recipe: what is checked.
    """
    if not any(task.reads_tokens for task in recipe.tasks):
        return
    try:
        folder = folder_of_base(recipe)
        architecture = Architecture.of_folder(folder, *recipe.auto_models)
        base = architecture.base_checkpoint(folder)
    except PaveError:  # told elsewhere
        return
    try:
        tokenizer = load_tokenizer(folder)
    except PaveError as error:
        yield f"base: {error}"
        return
    rows = table_rows(base, architecture)
    yield from row_problems("base", rows, architecture.vocabulary, tokenizer)
    if any(task.has_head for task in recipe.tasks):
        yield from _head_problems("base", architecture, tokenizer)
    tokenizers = {}
    for task in recipe.tasks:
        if task.expert is None or not task.reads_tokens:
            continue
        try:
            own = tokenizers[task.name] = load_tokenizer(existing_folder(task), folder)
            yield from _expert_problems(task, own, tokenizer, base, architecture)
            if recipe.vocabulary == "error":
                what = f"task '{task.name}': {existing_folder(task)}"
                yield from differing_tokens(what, own.get_vocab(), tokenizer.get_vocab())
        except PaveError as error:
            yield str(error) if str(error).startswith("task ") else f"task '{task.name}': {error}"
    if recipe.vocabulary == "error":
        yield from _clashes(tokenizers, tokenizer, rows)
    elif rows is None:
        yield f"vocabulary: {recipe.vocabulary}: the base has no table with a row for each token; leave it out"
    elif recipe.vocabulary == "union":
        known = {task: own.get_vocab() for task, own in tokenizers.items()}
        common = common_tokens("union", tokenizer.get_vocab(), rows, known)
        apart = list(union_problems(tokenizer, tokenizers, common.new))
        yield from apart or joined_problems(tokenizer, tokenizers, common.new_numbers) if common.new else ()


def token_notes(recipe: Recipe) -> Iterator[str]:
    """What a run does about tokens that nobody asked it to do, for a recipe in which nothing is wrong."""
    if not any(task.reads_tokens for task in recipe.tasks):
        return
    folder = folder_of_base(recipe)
    architecture = Architecture.of_folder(folder, *recipe.auto_models)
    base = architecture.base_checkpoint(folder)
    tokenizer = load_tokenizer(folder)
    note = padding_note(tokenizer)
    if note is not None:
        yield f"base: {note}"
    for task in recipe.tasks:
        if task.expert is not None and task.reads_tokens:
            yield from expert_notes(
                task.name, existing_folder(task), base, architecture, aligned=recipe.vocabulary != "error"
            )
    rows = table_rows(base, architecture)
    if recipe.vocabulary != "error" and rows is not None:
        named = [task for task in recipe.tasks if task.expert is not None and task.reads_tokens]
        known = {task.name: load_tokenizer(existing_folder(task), folder).get_vocab() for task in named}
        yield from alignment_notes(common_tokens(recipe.vocabulary, tokenizer.get_vocab(), rows, known), known)


def _expert_problems(
    task: Task,
    own: PreTrainedTokenizerBase,
    tokenizer: PreTrainedTokenizerBase,
    base: Checkpoint,
    architecture: Architecture,
) -> Iterator[str]:
    folder = existing_folder(task)
    what = f"task '{task.name}': {folder}"
    adapter = (folder / ADAPTER_CONFIG).is_file()
    its = architecture if adapter else Architecture.of_folder(folder, task.auto_model)
    rows = token_rows(folder, its, base)
    yield from row_problems(what, rows, rows if adapter else its.vocabulary, own)
    if task.has_head:
        yield from _head_problems(what, its, own)


def _head_problems(what: str, architecture: Architecture, tokenizer: PreTrainedTokenizerBase) -> Iterator[str]:
    """Why the head of an encoder-decoder would find no place to read: it reads where a text ends."""
    if not architecture.config.get("is_encoder_decoder"):
        return
    if architecture.config.get("decoder_start_token_id") is None:
        yield (
            f"{what}: its decoder begins with the token decoder_start_token_id, but config.json names none; set it "
            "(for T5 it is the padding token)"
        )
    end = architecture.config.get("eos_token_id")
    found = list(tokenizer.encode("a")).count(end)
    if found != 1:
        yield (
            f"{what}: its head reads the end-of-text token, {end} by config.json, but its tokenizer gives a text "
            f"{found or 'none'} of it; set eos_token_id, or add the token with the tokenizer"
        )


def _clashes(
    tokenizers: Mapping[str, PreTrainedTokenizerBase], tokenizer: PreTrainedTokenizerBase, rows: int | None
) -> Iterator[str]:
    """Rows of the base's embedding that its own tokenizer leaves free, and that experts use for different tokens."""
    known = set(tokenizer.get_vocab().values()) if tokenizers else set()
    used: dict[int, tuple[str, str]] = {}
    for task, own in tokenizers.items():
        for token, number in own.get_vocab().items():
            if number in known or rows is None or number >= rows:
                continue
            first, before = used.setdefault(number, (task, token))
            if before != token:
                yield (
                    f"tasks '{first}' and '{task}': token {number}, which the base's tokenizer leaves free, is "
                    f"{before!r} for one and {token!r} for the other, but they would share its row of the embedding"
                )
                break
