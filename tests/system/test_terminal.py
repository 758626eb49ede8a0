import io
import logging

from rich.table import Table
from rich.text import Text

from pave_lightning import cli
from pave_lightning.system.terminal import terminal

HOSTILE = "a\x1b[2J\x1b]0;title [red]b[/red] :smile: \u202ec"
SHOWN = "a\\x1b[2J\\x1b]0;title [red]b[/red] :smile: \\u202ec"


def printed(*contents, **options):
    stream = io.StringIO()
    console = terminal(file=stream, width=200, **options)
    for content in contents:
        console.print(content)
    return stream.getvalue()


def test_text_means_nothing_but_itself():
    table = Table(HOSTILE)
    table.add_row(HOSTILE)
    table.add_row(Text(HOSTILE))
    assert printed(table).count(SHOWN) == 3
    assert printed(HOSTILE).strip() == SHOWN


def test_colours_of_our_own_stay():
    assert "\x1b[31mred\x1b[0m" in printed(Text("red", style="red"), force_terminal=True, color_system="standard")


def test_messages_of_the_command_line(capsys, monkeypatch):
    monkeypatch.setattr(logging.getLogger("pave_lightning"), "handlers", [])
    assert cli.main(["plan", f"no-such-{HOSTILE}.yaml"]) == 2
    told = capsys.readouterr().err
    assert f"there is no recipe no-such-{SHOWN}.yaml" in told
    assert "\x1b" not in told


def test_the_log_of_the_command_line(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")
    ours = logging.getLogger("pave_lightning")
    monkeypatch.setattr(ours, "handlers", [])
    monkeypatch.setattr(ours, "propagate", True)
    cli._configure_output(False)
    ours.warning("broken: %s", HOSTILE)
    assert f"broken: {SHOWN}" in capsys.readouterr().err
