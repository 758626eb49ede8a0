"""Rows as prompts and responses, in texts and in tokens: plain ones, and those of a chat template."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from pave_lightning.errors import PaveError, reason
from pave_lightning.system.files import read_json
from pave_lightning.tasks.kinds.tokens import tokenizer_name

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Message = Mapping[str, str]
Side = Literal["left", "right"]

ROLES = ("system", "user", "assistant", "tool")
ANSWERING = "assistant"


@dataclass(frozen=True)
class Exchange:
    """What a model is asked, and what it is to answer, as texts.

    Attributes:
        prompt: the prompt; of a chat with all marks of its template.
        response: the response; of a chat with the marks that end it.
        framed: whether the marks of the template stand in both, so that a tokenizer adds none.
    """

    prompt: str
    response: str
    framed: bool = False


@dataclass(frozen=True)
class Tokens:
    """A prompt and its response as tokens.

    Attributes:
        prompt: at least one token.
        response: at least one token, the one that ends it included.
        prompt_cut: how many tokens of the prompt are left out.
        response_cut: how many of the response are.
    """

    prompt: list[int]
    response: list[int]
    prompt_cut: int = 0
    response_cut: int = 0


def chat_problem(tokenizer: PreTrainedTokenizerBase) -> str | None:
    """Why chats cannot be written with a tokenizer; None where they can."""
    name = tokenizer_name(tokenizer)
    if not tokenizer.chat_template:
        return (
            f"the tokenizer {name} has no chat template, by which messages become one text; take the tokenizer of an "
            "instruction-tuned model, put chat_template.jinja into the base's folder, or leave 'chat' and 'messages' "
            "out and name the columns 'prompt' and 'response'"
        )
    try:
        chat_exchange(tokenizer, [{"role": "user", "content": "a"}, {"role": ANSWERING, "content": "b"}])
    except PaveError as error:
        return str(error)
    return None


def chat_exchange(tokenizer: PreTrainedTokenizerBase, messages: Sequence[Message]) -> Exchange:
    """A chat as its tokenizer's template writes it; the last message is the response.

    Args:
        tokenizer: it has a chat template.
        messages: two or more, the last one the assistant's.

    Raises:
        PaveError: the template refuses the messages, or writes the prompt otherwise once there is a response.
    """
    name = tokenizer_name(tokenizer)
    try:
        prompt = str(tokenizer.apply_chat_template(messages[:-1], tokenize=False, add_generation_prompt=True))
        whole = str(tokenizer.apply_chat_template(messages, tokenize=False))
    # Templates are programs, which raise what they like.
    except Exception as error:
        raise PaveError(
            f"the chat template of the tokenizer {name} refuses the messages of roles "
            f"{', '.join(one['role'] for one in messages)} ({reason(error)}); write them as it wants them"
        ) from error
    if not whole.startswith(prompt) or len(whole) == len(prompt):
        raise PaveError(
            f"the chat template of the tokenizer {name} writes a prompt with a response otherwise than the prompt "
            "alone, so what is trained would not be what is asked; use another template (chat_template.jinja)"
        )
    return Exchange(prompt, whole[len(prompt) :], framed=True)


def chat_ends(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """The token that ends a response by the chat template: the first special one that is written behind it."""
    framed = chat_exchange(tokenizer, [{"role": "user", "content": "a"}, {"role": ANSWERING, "content": "b"}])
    special = set(tokenizer.all_special_ids) - {tokenizer.unk_token_id}  # which words of the text may be
    return [token for token in _ids(tokenizer, framed.response) if token in special][:1]


def generation_ends(folder: Path) -> list[int]:
    """The tokens that end texts by the generation settings in a model folder; none where it has no such settings."""
    file = folder / "generation_config.json"
    if not file.is_file():
        return []
    found = read_json(file).get("eos_token_id")
    return [one for one in (found if isinstance(found, list) else [found]) if isinstance(one, int)]


def tokens_of(
    tokenizer: PreTrainedTokenizerBase,
    exchanges: Sequence[Exchange],
    *,
    prompt_most: int,
    response_most: int,
    side: Side,
    encoder: bool = False,
) -> Iterator[Tokens]:
    """Prompts and responses as tokens, each by itself, so that training and generation read the same prompt.

    Args:
        tokenizer: it has an end-of-text token.
        exchanges: the texts.
        prompt_most: the most tokens of a prompt; the special ones that frame it are never cut.
        response_most: the most tokens of a response, the one that ends it included.
        side: where prompts are cut.
        encoder: whether prompts are read by an encoder, which wants the token at their end.
    """
    ends = {tokenizer.eos_token_id}
    if exchanges and exchanges[0].framed:
        ends |= set(chat_ends(tokenizer))
    for exchange in exchanges:
        before, prompt, after = _prompt(tokenizer, exchange, encoder=encoder)
        response = _response(tokenizer, exchange, ends)
        room = max(1, prompt_most - len(before) - len(after))
        kept = prompt[-room:] if side == "left" else prompt[:room]
        yield Tokens(
            [*before, *kept, *after],
            response[:response_most],
            len(prompt) - len(kept),
            max(0, len(response) - response_most),
        )


def _prompt(
    tokenizer: PreTrainedTokenizerBase, exchange: Exchange, *, encoder: bool
) -> tuple[list[int], list[int], list[int]]:
    """The tokens of a prompt: those that frame it before, the prompt, those behind."""
    if exchange.framed:
        return [], _ids(tokenizer, exchange.prompt), []
    found: Any = tokenizer(exchange.prompt, return_special_tokens_mask=True)
    ids, special = list(found["input_ids"]), list(found["special_tokens_mask"])
    start, end = 0, len(ids)
    while start < end and special[start]:
        start += 1
    while end > start and special[end - 1]:
        end -= 1
    # A causal model goes on from the prompt; what ends texts has no place there.
    return ids[:start], ids[start:end], ids[end:] if encoder else []


def _response(tokenizer: PreTrainedTokenizerBase, exchange: Exchange, ends: set[int | None]) -> list[int]:
    """The tokens of a response up to the one that ends it."""
    ids = _ids(tokenizer, exchange.response)
    if exchange.framed:
        last = next((place for place in reversed(range(len(ids))) if ids[place] in ends), None)
        if last is not None:
            return ids[: last + 1]
    return [*ids, int(tokenizer.eos_token_id)]


def _ids(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    return list(tokenizer(text, add_special_tokens=False)["input_ids"])
