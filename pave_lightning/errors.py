"""What a user sees when something is wrong: one readable message, no traceback."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Sequence

LISTED_PROBLEMS = 20


class PaveError(Exception):
    """A mistake in what was given (recipe, data, checkpoint, folder), told in words meant for the user."""


class Interrupted(Exception):  # noqa: N818 - being stopped is no error
    """The user or the system asked the program to stop; what is finished stays and the run can go on later.

    Args:
        exit_code: 130 after Ctrl-C, 143 after SIGTERM.
    """

    def __init__(self, exit_code: int) -> None:
        super().__init__(exit_code)
        self.exit_code = exit_code


class Problems:
    """Collects everything that is wrong, so that it can be told at once instead of one mistake a run."""

    def __init__(self, headline: str) -> None:
        self.headline = headline
        self.messages: list[str] = []

    def add(self, message: str) -> None:
        """Note one problem; the same words are noted once."""
        if message not in self.messages:
            self.messages.append(message)

    def extend(self, messages: Iterable[str]) -> None:
        """Note several problems."""
        for message in messages:
            self.add(message)

    def raise_if_any(self) -> None:
        """Raise one `PaveError` that lists up to 20 problems and counts the rest."""
        if not self.messages:
            return
        # What a message itself lists stands one step further in.
        shown = ["  - " + message.replace("\n", "\n    ") for message in self.messages[:LISTED_PROBLEMS]]
        hidden = len(self.messages) - len(shown)
        if hidden:
            shown.append(f"  ... and {hidden} more")
        raise PaveError("\n".join([self.headline, *shown]))


def nearest(name: str, known: Sequence[str]) -> str:
    """A hint for a mistyped name: the nearest known one, or the list of all when none is near."""
    close = difflib.get_close_matches(name, known, n=1, cutoff=0.5)
    if close:
        return f"did you mean '{close[0]}'?"
    return "known are: " + ", ".join(known) if known else "none is known"
