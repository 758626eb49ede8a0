"""Ctrl-C and SIGTERM end the program, whatever the libraries that they hit make of them. Nothing heavy is imported."""

from __future__ import annotations

import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

from pave_lightning.errors import Interrupted

# Exit codes of stopped programs are this and the signal's number.
STOPPED = 128
AGAIN_AFTER_SECONDS = 0.1
REPLACED_HANDLERS = (signal.SIG_DFL, signal.default_int_handler)


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
        raise KeyboardInterrupt if number == signal.SIGINT else Interrupted(STOPPED + number)

    def end_if_asked(self) -> None:
        """Unwind the program now, if something has swallowed what came."""
        if self.asked:
            raise Interrupted(STOPPED + self.asked[-1])

    def again(self) -> None:
        """Send the last signal once more, when what swallowed it has come to its end."""

        def send() -> None:
            if not self.over:
                signal.pthread_kill(threading.main_thread().ident or 0, self.asked[-1])

        timer = threading.Timer(AGAIN_AFTER_SECONDS, send)
        timer.daemon = True
        timer.start()


@contextmanager
def stoppable() -> Iterator[None]:
    """Let Ctrl-C (as `KeyboardInterrupt`) and SIGTERM (as `Interrupted`) unwind the block.

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

    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
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
