"""Ctrl-C and SIGTERM end the program, wherever they hit it."""

import signal
import subprocess
import sys
import threading
import time

import pytest

from pave_lightning import Recipe
from pave_lightning.errors import Interrupted
from pave_lightning.experts.trainers import honest_interrupts
from pave_lightning.recipe.loading import recipe_to_yaml
from pave_lightning.system import interrupts
from pave_lightning.system.interrupts import deferred, stoppable

pytestmark = pytest.mark.usefixtures("as_in_a_terminal")


class Swallows:
    """Is hit where Python cannot raise anything."""

    def __del__(self):
        signal.raise_signal(signal.SIGINT)


def converting(number):
    try:
        signal.raise_signal(number)
    except BaseException as error:
        raise ImportError("cannot import name 'naught'") from error


def swallowing():
    try:
        signal.raise_signal(signal.SIGINT)
    except BaseException:  # as a bare except does
        return


def test_signals_unwind_a_block_and_the_handlers_are_put_back():
    with pytest.raises(KeyboardInterrupt), stoppable():
        signal.raise_signal(signal.SIGINT)
    with pytest.raises(Interrupted) as caught, stoppable(), stoppable():
        signal.raise_signal(signal.SIGTERM)
    assert caught.value.exit_code == 143
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143), (signal.SIGHUP, 129)])
def test_what_a_library_makes_of_a_signal_is_told_as_being_stopped(number, code):
    with pytest.raises(Interrupted) as caught, stoppable():
        converting(number)
    assert caught.value.exit_code == code
    assert isinstance(caught.value.__cause__, ImportError)


def test_errors_without_a_signal_stay_what_they_are():
    with pytest.raises(ImportError, match="naught"), stoppable():
        raise ImportError("naught")


def test_a_swallowed_signal_does_not_keep_the_next_one_from_ending_the_block():
    def body():
        swallowing()
        signal.raise_signal(signal.SIGINT)

    with pytest.raises(KeyboardInterrupt), stoppable():
        body()


def test_a_swallowed_signal_ends_the_program_where_the_block_ends_or_another_begins():
    def body():
        swallowing()
        with stoppable():
            pytest.fail("went on")

    with pytest.raises(Interrupted), stoppable():
        body()
    with pytest.raises(Interrupted) as caught, stoppable():
        swallowing()
    assert caught.value.exit_code == 130


def test_what_is_swallowed_in_a_del_comes_again():
    def body():
        deadline = time.monotonic() + 10
        Swallows()
        while time.monotonic() < deadline:
            time.sleep(0.01)

    with pytest.raises(KeyboardInterrupt), stoppable():
        body()


def test_what_is_swallowed_at_the_end_of_a_block_ends_the_one_around_it():
    def body():
        with stoppable():
            Swallows()
        pytest.fail("went on")

    with pytest.raises(Interrupted), stoppable():
        body()


def test_who_deals_with_every_exception_does_not_swallow_sigterm():
    def body():
        try:
            signal.raise_signal(signal.SIGTERM)
        except Exception:
            pytest.fail("swallowed")

    with pytest.raises(Interrupted), stoppable():
        body()


def test_signals_that_are_ignored_or_taken_are_left_alone():
    seen = []
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, lambda number, frame: seen.append(number))
    with stoppable():
        signal.raise_signal(signal.SIGINT)
        signal.raise_signal(signal.SIGTERM)
    assert seen == [signal.SIGTERM]


def test_ctrl_c_works_again_where_lightning_has_switched_it_off():
    def body():
        signal.signal(signal.SIGINT, signal.SIG_IGN)  # as it does at the first one, before it tidies up
        raise ValueError("while tidying up")

    handler = signal.getsignal(signal.SIGINT)
    with pytest.raises(ValueError, match="tidying"), honest_interrupts():
        body()
    assert signal.getsignal(signal.SIGINT) is handler


@pytest.mark.parametrize(("number", "expected"), [(signal.SIGINT, KeyboardInterrupt), (signal.SIGTERM, Interrupted)])
def test_a_critical_section_ends_before_a_signal_unwinds_it(number, expected):
    done = []

    def body():
        with deferred():
            with deferred():
                signal.raise_signal(number)
                done.append("inner")
            done.append("outer")
        pytest.fail("went on")

    with pytest.raises(expected), stoppable():
        body()
    assert done == ["inner", "outer"]
    with stoppable(), deferred():  # nothing is left behind
        pass


def test_an_error_in_a_critical_section_is_told_as_being_stopped():
    def body():
        with deferred():
            signal.raise_signal(signal.SIGTERM)
            raise ValueError("in the section")

    with pytest.raises(Interrupted) as caught, stoppable():
        body()
    assert isinstance(caught.value.__cause__, ValueError)


def test_a_request_that_comes_twice_at_once_is_one_and_a_later_one_forces(monkeypatch):
    done = []

    def body():
        with deferred():
            signal.raise_signal(signal.SIGTERM)
            signal.raise_signal(signal.SIGTERM)
            done.append("same")
            monkeypatch.setattr(interrupts, "SAME_REQUEST_SECONDS", 0.0)
            signal.raise_signal(signal.SIGTERM)
            done.append("another")

    with pytest.raises(Interrupted), stoppable():
        body()
    assert done == ["same"]


def test_a_critical_section_that_hangs_is_unwound_after_all(monkeypatch):
    monkeypatch.setattr(interrupts, "DEFERRED_SECONDS", 0.3)
    monkeypatch.setattr(interrupts, "SAME_REQUEST_SECONDS", 0.1)

    def body():
        with deferred():
            signal.raise_signal(signal.SIGTERM)
            time.sleep(20)

    begun = time.monotonic()
    with pytest.raises(Interrupted), stoppable():
        body()
    assert time.monotonic() - begun < 10


def test_a_section_outside_the_main_thread_keeps_nothing_back():
    def wait():
        with deferred():
            entered.set()
            left.wait(10)

    entered, left = threading.Event(), threading.Event()
    thread = threading.Thread(target=wait)
    thread.start()
    entered.wait(10)
    with pytest.raises(Interrupted), stoppable():
        signal.raise_signal(signal.SIGTERM)
    assert thread.is_alive()
    left.set()
    thread.join()


@pytest.mark.parametrize("delay", [0.5, *(pytest.param(delay, marks=pytest.mark.slow) for delay in (0.2, 1.0))])
def test_a_command_is_stopped_while_it_loads(delay, recipe_settings, tmp_path):
    path = tmp_path / "tiny.yaml"
    path.write_text(recipe_to_yaml(Recipe.model_validate(recipe_settings)))
    script = (
        "import sys; from pave_lightning.cli import main; print('begun', flush=True); "
        f"sys.exit(main(['plan', {str(path)!r}]))"
    )
    options = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    with subprocess.Popen([sys.executable, "-c", script], **options) as command:
        assert command.stdout.readline() == "begun\n"
        time.sleep(delay)
        command.send_signal(signal.SIGINT)
        _, told = command.communicate(timeout=60)
    # Python ends by the signal itself, which shells tell as 130, where it hit code that was made from a text.
    assert command.returncode in (130, -signal.SIGINT), told
    assert told == "stopped; run the same command again to go on from here\n"
