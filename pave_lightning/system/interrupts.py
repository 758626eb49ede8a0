"""Ctrl-C, SIGTERM and SIGHUP end the program, whatever libraries make of them. Nothing heavy is imported."""

from __future__ import annotations

import signal
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

from pave_lightning.errors import Interrupted

# Exit codes of stopped programs are this and the signal's number.
STOPPED = 128
AGAIN_AFTER_SECONDS = 0.1
# What a terminal, a scheduler and a closed connection send; under nohup the last is ignored, and stays so.
# Not every system has the last.
SIGNALS = (signal.SIGINT, signal.SIGTERM, *([signal.SIGHUP] if hasattr(signal, "SIGHUP") else []))
REPLACED_HANDLERS = (signal.SIG_DFL, signal.default_int_handler)
# How long a signal waits for the end of a critical section before it unwinds it anyway.
DEFERRED_SECONDS = 10.0
# A driver and a terminal may both send the same request; only a later one is another.
SAME_REQUEST_SECONDS = 1.0


def raise_if_stopped(code: int) -> None:
    """Stop this program as another one was, whose exit code says so; both ways of saying it are known.

    Raises:
        Interrupted: the exit code is that of a signal of `SIGNALS`.
    """
    number = -code if code < 0 else code - STOPPED
    if number in SIGNALS:
        raise Interrupted(STOPPED + number)


class _Deferral:
    """Keeps signals back while a critical section of the main thread is open."""

    def __init__(self) -> None:
        self.depth = 0
        self.noted: int | None = None
        self._since = 0.0
        self._timer: threading.Timer | None = None

    def keeps(self, number: int) -> bool:
        """Whether this signal waits for the end of the section; a later second one does not."""
        if not self.depth:
            return False
        if self.noted is None:
            self.noted, self._since = number, time.monotonic()
            self._timer = threading.Timer(DEFERRED_SECONDS, _send_to_main_thread, [number])
            self._timer.daemon = True
            self._timer.start()
            return True
        return time.monotonic() - self._since < SAME_REQUEST_SECONDS

    def leave(self) -> int | None:
        """Close the outermost section; the signal that has waited for it, if one has."""
        noted, timer = self.noted, self._timer
        self.noted, self._timer = None, None
        self.depth = 0
        if timer is not None:
            timer.cancel()
        return noted


_deferral = _Deferral()


def _send_to_main_thread(number: int) -> None:
    signal.pthread_kill(threading.main_thread().ident or 0, number)


def _stop_of(number: int) -> BaseException:
    return KeyboardInterrupt() if number == signal.SIGINT else Interrupted(STOPPED + number)


@contextmanager
def deferred() -> Iterator[None]:
    """Let a signal that comes inside the block unwind the program at the end of the block.

    For what must not break off half way: a transaction, the renaming of a finished result. The wait is bounded: after
    10 seconds, or at a second signal, the block is unwound after all. Only signals that `stoppable` handles are kept
    back; blocks may be nested, and one outside the main thread, where no signal is handled, does nothing.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    _deferral.depth += 1
    try:
        yield
    except (KeyboardInterrupt, Interrupted):
        if _deferral.depth == 1:
            _deferral.leave()  # it has come, forced or from elsewhere
        else:
            _deferral.depth -= 1
        raise
    except BaseException as error:
        _end_deferral(error)
        raise
    _end_deferral(None)


def _end_deferral(error: BaseException | None) -> None:
    if _deferral.depth > 1:
        _deferral.depth -= 1
        return
    noted = _deferral.leave()
    if noted is not None:
        raise _stop_of(noted) from error


class _Stop:
    """Handles signals: notes that they came and unwinds the program.

    Attributes:
        asked: the signals that came.
        over: whether its block has ended.
    """

    def __init__(self) -> None:
        self.asked: list[int] = []
        self.over = False

    def __call__(self, number: int, frame: FrameType | None) -> None:
        self.asked.append(number)
        if not _deferral.keeps(number):
            raise _stop_of(number)

    def end_if_asked(self) -> None:
        """Unwind the program now, if something has swallowed what came."""
        if self.asked:
            raise Interrupted(STOPPED + self.asked[-1])

    def again(self) -> None:
        """Send the last signal once more, when what swallowed it has come to its end."""

        def send() -> None:
            if not self.over:
                _send_to_main_thread(self.asked[-1])

        timer = threading.Timer(AGAIN_AFTER_SECONDS, send)
        timer.daemon = True
        timer.start()


@contextmanager
def stoppable() -> Iterator[None]:
    """Let Ctrl-C (as `KeyboardInterrupt`), SIGTERM and SIGHUP (as `Interrupted`) unwind the block.

    A signal can hit any line of a library, which then swallows it or fails with an error of its own. What is swallowed
    where Python cannot raise anything, such as a ``__del__``, is sent again; what a library catches ends the program
    where the next block begins or this one ends; an error that ends the block after a signal is told as `Interrupted`.
    Signals that are ignored, or that somebody else handles, are left alone, and so are those of a block that does not
    run in the main thread.

    Raises:
        Interrupted: the block, or one around it, was asked to stop, and went on or ended with an error.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    stop, told = _Stop(), sys.unraisablehook

    def unraisable(found: sys.UnraisableHookArgs) -> None:
        if stop.asked and isinstance(found.exc_value, (KeyboardInterrupt, Interrupted)):
            stop.again()
        else:
            told(found)

    handlers = {number: signal.getsignal(number) for number in SIGNALS}
    ours = {number: old for number, old in handlers.items() if old in REPLACED_HANDLERS or isinstance(old, _Stop)}
    try:
        for outer in ours.values():
            if isinstance(outer, _Stop):
                outer.end_if_asked()
        sys.unraisablehook = unraisable
        for number in ours:
            signal.signal(number, stop)
        yield
        stop.end_if_asked()
    except BaseException as error:
        if stop.asked and not isinstance(error, (KeyboardInterrupt, Interrupted)):
            raise Interrupted(STOPPED + stop.asked[-1]) from error
        raise
    finally:
        stop.over = True
        sys.unraisablehook = told
        for number, old in ours.items():
            signal.signal(number, old)
