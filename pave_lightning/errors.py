"""What a user sees when something is wrong: one readable message, no traceback."""

from __future__ import annotations

import errno
import logging
import re
import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager

from pave_lightning.credentials import without_secrets

log = logging.getLogger("pave_lightning")

LISTED_PROBLEMS = 20

# What the system says of the machine, never of the program; it does not always name the file.
FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
NO_ACCESS = (errno.EACCES, errno.EPERM, errno.EROFS)
BROKEN = (errno.EIO, errno.ESTALE)


class PaveError(Exception):
    """A mistake in what was given (recipe, data, checkpoint, folder), told in words meant for the user.

    Args:
        message: The words; passwords and tokens in URIs that they quote are left out.
    """

    def __init__(self, message: str) -> None:
        super().__init__(without_secrets(message))


class Interrupted(BaseException):
    """The user or the system asked the program to stop; what is finished stays and the run can go on later.

    No error, so that nobody who deals with every ``Exception`` goes on in spite of it.

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
    import difflib  # here, since the command line loads this file before all else

    close = difflib.get_close_matches(name, known, n=1, cutoff=0.5)
    if close:
        return f"did you mean '{close[0]}'?"
    return "known are: " + ", ".join(known) if known else "none is known"


def listed(names: Sequence[str], most: int = LISTED_PROBLEMS) -> str:
    """The first names, and how many more there are."""
    rest = len(names) - most
    return ", ".join(names[:most]) + (f" and {rest} more" if rest > 0 else "")


@contextmanager
def doing(what: str) -> Iterator[None]:
    """Tell that something begins, and how long it took; where it does not end, that it was this that broke off.

    What is told of a mistake begins with it, see `naming`.
    """
    log.info("%s ...", what)
    start = time.monotonic()
    try:
        with naming(what):
            yield
    except Exception:
        log.error("%s broke off after %.1f s", what, time.monotonic() - start)
        raise
    log.info("%s done in %.1f s", what, time.monotonic() - start)


@contextmanager
def naming(what: str) -> Iterator[None]:
    """Let what is told of a mistake begin with what was being done; the error stays of its kind."""
    try:
        yield
    except PaveError as error:
        if not str(error).startswith(f"{what}: "):
            error.args = (f"{what}: {error}",)
        raise


def system_problem(error: BaseException) -> str | None:
    """What the system refused, where that is what ended the program: the file, the reason, and what to do.

    Returns:
        A message for the user; None for every other error.
    """
    if isinstance(error, OSError):
        file = error.filename2 or error.filename  # where something is copied to, the place comes second
        # Others, such as a file that is missing, may well be a fault of the program.
        known = error.errno in (*FULL, *BROKEN) or (error.errno in NO_ACCESS and file is not None)
        where = "" if file is None else f"{file}: "
        return f"{where}{error.strerror}; {_remedy(error.errno)}" if known else None
    # Not imported: what is not loaded has raised nothing. Its errors carry the system's only as "(os error 28)".
    number = re.search(r"\(os error (\d+)\)", str(error)) if type(error).__name__ == "SafetensorError" else None
    return f"{error}; {_remedy(int(number[1]))}" if number else None


def _remedy(number: int | None) -> str:
    if number in FULL:
        return "make room, or let the results go elsewhere (--set output=FOLDER), and run the same command again"
    if number in NO_ACCESS:
        return (
            "let this user read and write it, or choose another (--set output=FOLDER), and run the same command again"
        )
    return "mend that and run the same command again (--debug shows where it happened)"
