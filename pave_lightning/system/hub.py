"""The Hugging Face hub, where it cannot be reached: found out once and in seconds, not by the retries of every file."""

from __future__ import annotations

import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from functools import lru_cache

PATIENCE_SECONDS = 5


@lru_cache(maxsize=1)
def hub_answers() -> bool:
    """Whether the hub answers at all; asked once in a process. False where HF_HUB_OFFLINE says not to ask."""
    from huggingface_hub import constants, get_session

    if constants.HF_HUB_OFFLINE:
        return False
    answers: list[int] = []

    def ask() -> None:
        with suppress(Exception):  # of the kinds of whichever HTTP client the hub's library uses
            answers.append(get_session().head(constants.ENDPOINT, timeout=PATIENCE_SECONDS).status_code)

    # In a thread, since looking up a host knows no time limit.
    thread = threading.Thread(target=ask, daemon=True)
    thread.start()
    thread.join(PATIENCE_SECONDS)
    return bool(answers)


@contextmanager
def hub_or_cache() -> Iterator[None]:
    """While the block runs, what asks the hub takes what was fetched before, at once, where the hub does not answer."""
    from huggingface_hub import constants

    if hub_answers():
        yield
        return
    datasets = sys.modules.get("datasets")
    places = [constants, *([datasets.config] if datasets is not None else [])]
    before = [place.HF_HUB_OFFLINE for place in places]
    for place in places:
        place.HF_HUB_OFFLINE = True
    try:
        yield
    finally:
        for place, value in zip(places, before, strict=True):
            place.HF_HUB_OFFLINE = value


def unreached() -> str:
    """Why the hub could not be asked; empty where it answers."""
    from huggingface_hub import constants

    if constants.HF_HUB_OFFLINE:
        return "HF_HUB_OFFLINE is set, so only what was fetched before is there"
    return "" if hub_answers() else f"the hub ({constants.ENDPOINT}) does not answer; is there a network?"
