"""What a user sees when something is wrong: one readable message, no traceback."""

from __future__ import annotations

import errno
import logging
import os
import re
import time
import unicodedata
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from pave_lightning.credentials import without_secrets

log = logging.getLogger("pave_lightning")

LISTED_PROBLEMS = 20
MOST_KNOWN = 100
LONGEST_NAME = 200
MOST_COMPARED = 2000
LONGEST_QUOTE = 200
LONGEST_REASON = 400
NEARLY_FULL_BYTES = 1 << 20

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
        exit_code: 130 after Ctrl-C, 143 after SIGTERM, 129 after SIGHUP.
    """

    def __init__(self, exit_code: int) -> None:
        super().__init__(exit_code)
        self.exit_code = exit_code


class Problems:
    """Collects everything that is wrong, so that it can be told at once instead of one mistake a run."""

    def __init__(self, headline: str) -> None:
        self.headline = headline
        self._messages: dict[str, None] = {}  # in order, and quick to search where there are thousands

    @property
    def messages(self) -> list[str]:
        """What has been noted so far, in that order."""
        return list(self._messages)

    def add(self, message: str) -> None:
        """Note one problem; the same words are noted once."""
        self._messages.setdefault(message)

    def extend(self, messages: Iterable[str]) -> None:
        """Note several problems."""
        for message in messages:
            self.add(message)

    def raise_if_any(self) -> None:
        """Raise one `PaveError` that lists up to 20 problems and counts the rest."""
        messages = self.messages
        if not messages:
            return
        # What a message itself lists stands one step further in.
        shown = ["  - " + message.replace("\n", "\n    ") for message in messages[:LISTED_PROBLEMS]]
        hidden = len(messages) - len(shown)
        if hidden:
            shown.append(f"  ... and {hidden} more")
        raise PaveError("\n".join([self.headline, *shown]))


def nearest(name: str, known: Sequence[str]) -> str:
    """A hint for a mistyped name: the nearest known one, or the list of all when none is near."""
    close = near(name, known)
    if close:
        alike = {unicodedata.normalize("NFC", one).strip("\ufeff") for one in (close, name)}
        if close != name and len(alike) == 1:
            return f"did you mean {close!a}, which only looks the same?"
        return f"did you mean '{close}'?"
    return "known are: " + listed([shortened(one) for one in known], MOST_KNOWN) if known else "none is known"


def near(name: str, known: Sequence[str], least: float = 0.5) -> str | None:
    """The known name that is most like another one; None where none is, or where to compare them takes too long.

    Args:
        name: the mistyped name.
        known: the names that there are.
        least: how like the nearest must be, from 0 to 1.
    """
    import difflib  # here, since the command line loads this file before all else

    if len(name) > LONGEST_NAME:
        return None
    # Comparing takes the product of two lengths, for each of them.
    comparable = [one for one in known if len(one) <= LONGEST_NAME][:MOST_COMPARED]
    return next(iter(difflib.get_close_matches(name, comparable, n=1, cutoff=least)), None)


def shortened(text: str, most: int = LONGEST_QUOTE) -> str:
    """Text of which no more is shown than a message can bear."""
    return text if len(text) <= most else f"{text[: most - 3]}..."


def listed(names: Sequence[str], most: int = LISTED_PROBLEMS) -> str:
    """The first names, and how many more there are."""
    rest = len(names) - most
    return ", ".join(names[:most]) + (f" and {rest} more" if rest > 0 else "")


def counted(number: int, what: str) -> str:
    """A number of things, with an s where there is not just one."""
    return f"{number} {what}{'' if number == 1 else 's'}"


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


@contextmanager
def foreign(what: str, advice: str = "") -> Iterator[None]:
    """Around a library that reads what a user gave: whatever it makes of broken content becomes a message.

    transformers, tokenizers, peft and safetensors raise errors of nearly every kind for a broken file, and Rust code
    its own that is no ``Exception``. Only the call of the library belongs inside, so that faults of ours still show.

    Args:
        what: what cannot be done, with the file.
        advice: what to do, where more is known than the reason says.

    Raises:
        PaveError: the library failed. What the system refuses, such as a full disk, stays an `OSError`.
    """
    try:
        yield
    except (PaveError, KeyboardInterrupt, Interrupted, GeneratorExit):
        raise
    except BaseException as error:
        if isinstance(error, OSError) and system_problem(error) is not None:
            raise
        raise PaveError(f"{what}: {reason(error)}{f'; {advice}' if advice else ''}") from error


# Advice to do what is refused here, and what names no fault.
_LINK = re.compile(r"https?://")
_USELESS = re.compile(
    r"weights_only|trust_remote_code|allow_pickle|add_safe_globals|^Traceback|^During handling|^The above ex"
    r"|-invoked autoflush"
)
_PLAIN_KINDS = (
    *("Exception", "ImportError", "MisconfigurationException", "ModuleNotFoundError", "OSError", "RuntimeError"),
    *("SafetensorError", "ValueError"),
)
_SAY_NOTHING = re.compile(r"^(Error\(s\) in|Validation error|Class validation error)|[:,]$")


def reason(error: BaseException, uri: str = "") -> str:
    """What an error of a library says, in one line: its kind, if that tells anything, and what of its message does.

    A line that only announces the next one stands before it; links and advice to load what may hold code are left out.

    Args:
        error: the error.
        uri: what was to be reached, where it was that: links then belong to the message, and its secrets are left out.
    """
    kind = type(error).__name__
    if isinstance(error, OSError) and error.strerror:
        return error.strerror if error.filename is None else f"{error.filename}: {error.strerror}"
    message = shortened(without_secrets(str(error), uri), 50 * LONGEST_REASON)
    lines = [" ".join(line.split()) for line in message.splitlines()]
    told: list[str] = []
    for line in filter(None, lines):
        sentences = [sentence for sentence in re.split(r"(?<=[.!?]) ", line) if not _USELESS.search(sentence)]
        told += [sentence for sentence in sentences if sentence and (uri or not _LINK.search(sentence))]
        if told and not _SAY_NOTHING.search(told[-1]):
            break
    text = shortened(" ".join(told).rstrip(".:, "), LONGEST_REASON)
    return kind if not text else text if kind in _PLAIN_KINDS else f"{kind}: {text}"


def visible(text: str) -> str:
    """Text as it can be shown: what would move the cursor, change colours or turn the direction is spelt out.

    Line breaks and tabs stay. Text of files, of their names and of libraries can hold anything.
    """
    return _UNSEEN.sub(lambda found: found[0].encode("unicode_escape").decode(), text)


# Control characters, line and paragraph separators, marks that turn the direction of text, halves of characters.
_UNSEEN = re.compile(
    r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u2028\u2029\u200e\u200f\u061c\u202a-\u202e\u2066-\u2069\ud800-\udfff]"
)


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
        return f"{where}{error.strerror}; {_remedy(error.errno, file)}" if known else None
    if _is_lost_connection(error):
        return _lost_connection(error)
    # Not imported: what is not loaded has raised nothing. Its errors carry the system's only as "(os error 28)".
    number = re.search(r"\(os error (\d+)\)", str(error)) if type(error).__name__ == "SafetensorError" else None
    return f"{error}; {_remedy(int(number[1]), None)}" if number else None


def _remedy(number: int | None, file: object) -> str:
    place = _elsewhere(number, file)
    if number in FULL:
        return f"make room, or let {place}, and run the same command again"
    if number in NO_ACCESS:
        return f"let this user read and write it, or let {place}, and run the same command again"
    return "mend that and run the same command again (--debug shows where it happened)"


def _elsewhere(number: int | None, file: object) -> str:
    """Which setting moves a file elsewhere; of a full disk whose file is not told, the one that is full."""
    import tempfile  # here, like shutil below: the command line loads this file before all else

    temporary = Path(tempfile.gettempdir())
    cache = Path(os.environ.get("HF_HOME") or Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache") / "huggingface")
    cache = cache.expanduser()
    in_temporary, in_cache = (
        "temporary files go elsewhere (TMPDIR=FOLDER)",
        "the hub's files go elsewhere (HF_HOME=FOLDER)",
    )
    output = "the results go elsewhere (--set output=FOLDER)"
    if isinstance(file, str | bytes | os.PathLike):
        path = Path(os.fsdecode(file)).absolute()
        if path.is_relative_to(cache):
            return in_cache
        inside = path.relative_to(temporary).parts if path.is_relative_to(temporary) else ()
        # A run folder may lie there as well; what is made by tempfile, for us and for libraries, begins with these.
        return in_temporary if inside and (len(inside) == 1 or inside[0].startswith(("pave-", "tmp"))) else output
    if number in FULL and not _is_full(Path()):
        return in_temporary if _is_full(temporary) else in_cache if _is_full(cache) else output
    return output


def _is_full(folder: Path) -> bool:
    import shutil

    try:
        return shutil.disk_usage(folder).free < NEARLY_FULL_BYTES
    except OSError:
        return False


_LOST = re.compile(
    r"gloo|NCCL|Connection (closed|reset) by peer|Broken pipe.*rank|Socket Timeout|client socket|TCPStore|c10d", re.I
)


def _is_lost_connection(error: BaseException) -> bool:
    """Whether it is what torch.distributed raises where processes can no longer reach each other."""
    kinds = {kind.__name__ for kind in type(error).__mro__}
    return bool(kinds & {"DistError", "DistBackendError", "DistNetworkError", "DistStoreError"}) or (
        type(error) is RuntimeError and bool(_LOST.search(str(error)))
    )


def _lost_connection(error: BaseException) -> str:
    rank, world = os.environ.get("RANK") or os.environ.get("LOCAL_RANK") or "0", os.environ.get("WORLD_SIZE")
    who = f"process {rank}{f' of {world}' if world else ''}"
    return (
        f"{who} cannot reach the others that it works with ({reason(error)}); most often one of them ended first: see "
        "what it says above, mend that and run the same command again; where none of them ended, the network between "
        "them or another program on the same port is the cause"
    )
