"""The command ``pave``. Nothing heavy is imported before a command needs it, nor before Ctrl-C is handled."""

from __future__ import annotations

import atexit
import gc
import io
import logging
import os
import sys
import traceback
import warnings
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

from pave_lightning.credentials import has_secrets, without_secrets
from pave_lightning.system.interrupts import stoppable
from pave_lightning.system.processes import end_with_parent, is_launched, is_rank_zero, refuse_foreign_launchers

if TYPE_CHECKING:
    from collections.abc import Callable
    from types import TracebackType

    from jsonargparse import ArgumentParser, Namespace

RECIPE_COMMANDS = {
    "run": "do everything a recipe asks for: fit, capture, purify, merge, evaluate, report",
    "plan": "check everything and show what would be done; run nothing",
    "fit": "fine-tune the experts (or one of them)",
    "align": "give the experts one vocabulary, where the recipe's key vocabulary is base_rows or union",
    "joint": "fine-tune one model on all tasks together, where the recipe has it among its controls",
    "capture": "measure what the experts' layers see",
    "purify": "write the purified experts as ordinary checkpoints",
    "diagnose": "show what purification does to the task vectors, as tables and pictures",
    "merge": "purify and merge the experts",
    "evaluate": "score base, experts and merged models on the test splits",
    "report": "write tables and pictures from the scores that are there",
}
SWEEP = "run a recipe over a grid of settings and seeds; write a table, a picture and findings"
COMPARE = "compare two models of a run: paired differences with intervals, and where they disagree"
CONVERT = "write a model whose weights are pickled (pytorch_model.bin) as a folder with safetensors"
NEW = "write a starting recipe from looking at files: columns, classes, splits"
RECIPES = "list the shipped recipes, or print one"
QUICKSTART = "run the shipped recipe quickstart: small tasks and models, offline, minutes on two CPU cores"
EXPORT = "write a merged model of a run in another form, such as one LoRA adapter of its base"
PER_TASK = ("fit", "capture")
# How libraries are asked to keep their warnings to themselves.
QUIET = {
    "PYTHONWARNINGS": "ignore",
    "TRANSFORMERS_VERBOSITY": "error",
    "DATASETS_VERBOSITY": "error",
    "HF_HUB_VERBOSITY": "error",
    "TORCH_CPP_LOG_LEVEL": "ERROR",
}
# An option with one value: gathered, so that none is lost unseen.
SINGLE: dict[str, Any] = {"type": str, "action": "append", "default": []}
VERIFYING = ("run", "plan", "quickstart")
EVALUATING = ("run", "plan", "evaluate", "quickstart")
CODE: dict[str, Any] = {
    "action": "store_true",
    "help": "let benchmarks run code that models write (HumanEval, MBPP), and Python files beside task files of your "
    "own; it runs with your rights, so do this in a container",
}
VERIFY: dict[str, Any] = {
    "action": "store_true",
    "help": "hash every input and every result that is there, instead of relying on size, times and inode",
}


def build_parser() -> ArgumentParser:
    """The parser of the command line."""
    from jsonargparse import ArgumentParser

    def new(**options: Any) -> ArgumentParser:
        return ArgumentParser(allow_abbrev=False, **options)

    parser = new(
        prog="pave",
        description="Turn separately fine-tuned models into one model that does all their tasks.",
        version=_version(),
    )
    single = SINGLE
    commands = parser.add_subcommands(required=True, dest="command")
    for name, summary in {**RECIPE_COMMANDS, "quickstart": QUICKSTART}.items():
        command = new(description=summary[0].upper() + summary[1:] + ".")
        optional: dict[str, Any] = {"nargs": "?", "default": None} if name == "merge" else {}
        if name != "quickstart":
            command.add_argument("recipe", type=str, help="path of a recipe, or name of a shipped one", **optional)
        command.add_argument(
            "--set",
            action="append",
            default=[],
            metavar="KEY=VALUE",
            help="change a key of the recipe, such as --set merge.0.scale=0.4 or --set tasks.movie.examples.train=500; "
            "may be repeated",
        )
        command.add_argument(
            "--print-config", action="store_true", help="print the resolved recipe with every default and stop"
        )
        if name in VERIFYING:
            command.add_argument("--verify", **VERIFY)
        if name in EVALUATING:
            command.add_argument("--allow-code-execution", **CODE)
        if name in PER_TASK:
            command.add_argument("--task", **single, help="only this task")
        if name == "merge":
            command.add_argument(
                "--into", **single, metavar="MERGED", help="a merged model to which an expert is added"
            )
            command.add_argument("--add", **single, metavar="TASK=EXPERT", help="the expert, with the name of its task")
            command.add_argument("--output", **single, metavar="FOLDER", help="where the result goes (MERGED-TASK)")
            command.add_argument(
                "--fisher", **single, metavar="FILE", help="the expert's Fisher information, if needed"
            )
            command.add_argument(
                "--accept", **single, metavar="KEY", help="what may differ in the expert, as expert.accept of a recipe"
            )
        command.add_argument("--debug", action="store_true", help="show tracebacks and the libraries' own messages")
        commands.add_subcommand(name, command, help=summary)
    sweep = new(description=f"{SWEEP[0].upper()}{SWEEP[1:]}.")
    sweep.add_argument("name", type=str, help="path of a recipe, or name of a shipped sweep")
    sweep.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="change a key of the recipe")
    sweep.add_argument("--verify", **VERIFY)
    sweep.add_argument("--debug", action="store_true", help="show tracebacks and the libraries' own messages")
    commands.add_subcommand("sweep", sweep, help=SWEEP)
    compare = new(description=f"{COMPARE[0].upper()}{COMPARE[1:]}.")
    compare.add_argument("run", type=str, help="the folder of a run, such as checkpoints/quickstart")
    for name in ("a", "b"):
        compare.add_argument(
            name,
            type=str,
            nargs="?",
            default=None,
            help="a model: its name below scores/; without both, all are listed",
        )
    compare.add_argument("--task", **single, help="only this task")
    compare.add_argument("--metric", **single, help="this metric instead of each task's primary one")
    compare.add_argument("--rows", type=int, default=5, help="how many rows of disagreement are shown of each task")
    compare.add_argument("--output", **single, metavar="FILE", help="a .csv or .parquet file for all disagreements")
    compare.add_argument("--debug", action="store_true", help="show tracebacks")
    commands.add_subcommand("compare", compare, help=COMPARE)
    _add_commands_without_recipe(commands, new, single)
    return parser


def _add_commands_without_recipe(commands: Any, new: Callable[..., ArgumentParser], single: Mapping[str, Any]) -> None:
    """Add the commands about models, methods and transforms, whatever recipes there are."""
    convert = new(description=f"{CONVERT[0].upper()}{CONVERT[1:]}.")
    convert.add_argument("source", type=str, help="a folder, a GGUF file or a hub id")
    convert.add_argument("output", type=str, help="the folder to be made")
    convert.add_argument("--folder", **single, help="folder of the model inside of the hub repository")
    convert.add_argument("--revision", **single, help="commit, tag or branch of the hub repository")
    convert.add_argument("--debug", action="store_true", help="show tracebacks")
    commands.add_subcommand("convert", convert, help=CONVERT)
    commands.add_subcommand("export", _export_parser(new), help=EXPORT)
    recipes = new(description=f"{RECIPES[0].upper()}{RECIPES[1:]}.")
    recipes.add_argument("name", type=str, nargs="?", default=None, help="a recipe, to see its text")
    recipes.add_argument("--debug", action="store_true", help="show tracebacks")
    commands.add_subcommand("recipes", recipes, help=RECIPES)
    commands.add_subcommand("new", _start_parser(new), help=NEW)
    methods = new(description="List the merge methods, or the options of one.")
    methods.add_argument("method", type=str, nargs="?", default=None, help="a method, to see its options")
    methods.add_argument("--debug", action="store_true", help="show tracebacks")
    commands.add_subcommand("methods", methods, help="list the merge methods, or the options of one")
    transforms = new(description="List the transforms of task vectors, or the options of one.")
    transforms.add_argument("transform", type=str, nargs="?", default=None, help="a transform, to see its options")
    transforms.add_argument("--debug", action="store_true", help="show tracebacks")
    commands.add_subcommand("transforms", transforms, help="list the transforms of task vectors, or the options of one")
    schema = new(description="Print the JSON schema of recipes, for editors.")
    schema.add_argument("--debug", action="store_true", help="show tracebacks")
    commands.add_subcommand("schema", schema, help="print the JSON schema of recipes, for editors")


def _start_parser(new: Callable[..., ArgumentParser]) -> ArgumentParser:
    """The parser of ``pave new``."""
    start = new(description=f"{NEW[0].upper()}{NEW[1:]}.")
    start.add_argument("name", type=str, help="name of the recipe, or path of its file; it must not exist")
    start.add_argument(
        "--tasks", type=str, nargs="+", required=True, metavar="FILE", help="csv, jsonl or parquet files, or folders"
    )
    start.add_argument(
        "--base", type=str, required=True, help="the base model: a folder, a hub id, package:NAME/FOLDER"
    )
    start.add_argument(
        "--set",
        action="append",
        default=[],
        metavar="tasks.NAME.KEY=VALUE",
        help="what cannot be told from the files, such as --set tasks.reviews.label=stars; may be repeated",
    )
    start.add_argument("--debug", action="store_true", help="show tracebacks")
    return start


def _export_parser(new: Callable[..., ArgumentParser]) -> ArgumentParser:
    """The parser of ``pave export``."""
    export = new(description=f"{EXPORT[0].upper()}{EXPORT[1:]}.")
    export.add_argument("run", type=str, help="the folder of a run, such as checkpoints/quickstart")
    export.add_argument("--model", **SINGLE, metavar="NAME", help="a merged model; without it, all are listed")
    export.add_argument(
        "--lora", **SINGLE, metavar="RANK", help="as one LoRA adapter (peft) of that rank at most; what is lost is told"
    )
    export.add_argument("--task", **SINGLE, help="with the head of this task")
    export.add_argument(
        "--keep-whole",
        action="store_true",
        help="let the adapter hold norms, biases and embeddings as they are; without it, their changes are left out",
    )
    export.add_argument("--output", **SINGLE, metavar="FOLDER", help="where the result goes; it must not exist")
    export.add_argument("--debug", action="store_true", help="show tracebacks")
    return export


def main(arguments: list[str] | None = None) -> int:
    """Run a command; returns its exit code: 0 done, 2 a mistake of the user, 129, 130 or 143 stopped, 1 our fault."""
    from pave_lightning.errors import Interrupted, PaveError

    if is_launched():
        end_with_parent()
    try:
        with stoppable():
            return _run(arguments)
    except (Interrupted, KeyboardInterrupt) as stop:
        if isinstance(stop.__cause__, PaveError):  # it may have come of being stopped, or else is worth knowing
            _say(f"error: {stop.__cause__}")
        if not is_launched():  # or else the driver says it, once
            _say("stopped; run the same command again to go on from here")
        return stop.exit_code if isinstance(stop, Interrupted) else 130


def program() -> NoReturn:
    """The command as a program of its own: runs it and ends at once.

    To take the libraries apart again takes Python seconds in which nothing is done and Ctrl-C shows a traceback.
    """
    _open_closed_streams()
    gc.set_threshold(50_000)  # imports make many objects and no garbage: with Python's 700, 8 % of a plan looks for it
    code = main()
    logging.shutdown()
    atexit._run_exitfuncs()  # temporary folders
    for stream in (sys.stdout, sys.stderr):
        with suppress(OSError, ValueError):  # who reads our output has gone, or it is closed
            stream.flush()
    os._exit(code)


def _open_closed_streams() -> None:
    """Put the null device in the place of each standard stream that is closed, as with ``pave run R.yaml >&-``.

    Else the next file that is opened has its number, and is written into by whoever prints.
    """
    for number, (name, mode) in enumerate((("stdin", "r"), ("stdout", "w"), ("stderr", "w"))):
        if getattr(sys, name) is None:
            stream = Path(os.devnull).open(mode)  # noqa: SIM115  it stays open to the end
            if stream.fileno() != number:
                os.dup2(stream.fileno(), number)
            setattr(sys, name, stream)


def _run(arguments: list[str] | None) -> int:
    parsed = build_parser().parse_args(arguments)
    command = str(parsed.command)
    options = parsed[command]
    _configure_output(bool(options.debug))
    if any(has_secrets(text) for text in options.get("set") or ()):
        _say(
            "warning: the command line holds a password or token, which other users (ps) and the shell's history can "
            "show. Write *** in its place and give the full URI in the environment variable PAVE_TRACKING_URI"
        )
    try:
        with stoppable():  # what a library makes of Ctrl-C is told as being stopped, not as an error
            _execute(command, options)
    except Exception as error:
        return _exit_code(error, debug=bool(options.debug))
    return 0


def _exit_code(error: Exception, *, debug: bool) -> int:
    """Tell what ended a command, and with which exit code.

    Raises:
        Exception: the error itself, for its traceback.
    """
    from pave_lightning.errors import PaveError, system_problem

    if isinstance(error, BrokenPipeError):  # who reads our output has gone
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    if debug:
        sys.excepthook = _show_traceback
        raise error
    problem = str(error) if isinstance(error, PaveError) else system_problem(error)
    if problem is not None:
        _say(f"error: {problem}")
        return 2
    _say(f"unexpected error: {type(error).__name__}: {error}\nrun again with --debug to see where")
    return 1


def _execute(command: str, options: Namespace) -> None:
    if command == "methods":
        from pave_lightning.merging.describe import print_methods

        return print_methods(options.method)
    if command == "transforms":
        from pave_lightning.transforms.describe import print_transforms

        return print_transforms(options.transform)
    if command == "compare":
        from pave_lightning.pipeline.comparing import compare

        task, metric, output = (_once(options, name) for name in ("task", "metric", "output"))
        return compare(options.run, options.a, options.b, task=task, metric=metric, rows=options.rows, output=output)
    if command in (others := {"convert": _convert, "export": _export, "new": _start, "recipes": _recipes}):
        return others[command](options)
    if command == "schema":
        import json

        from pave_lightning.recipe.loading import recipe_schema

        return _out(json.dumps(recipe_schema(), indent=2))
    return _execute_recipe(command, options)


def _export(options: Namespace) -> None:
    from pave_lightning.errors import PaveError

    model, lora, task, output = (_once(options, name) for name in ("model", "lora", "task", "output"))
    if lora is not None and not lora.isdecimal():
        raise PaveError(f"--lora takes a rank, a whole number of at least 1, found {lora}")
    from pave_lightning.pipeline.exporting import export

    rank = None if lora is None else int(lora)
    export(options.run, model, output, lora=rank, task=task, keep_whole=bool(options.keep_whole))


def _start(options: Namespace) -> None:
    from pave_lightning.recipe.starting import start_recipe

    path = start_recipe(options.name, options.tasks, options.base, options.set)
    _out(f"{path} is written; check it, then run: pave plan {path}")


def _recipes(options: Namespace) -> None:
    if options.name is None:
        from pave_lightning.recipe.catalogue import print_recipes

        return print_recipes()
    from pave_lightning.recipe.finding import shipped_recipe

    _, file = shipped_recipe(options.name)
    _say(f"# {file}")
    return _out(file.read_text(encoding="utf-8").rstrip())


def _execute_sweep(options: Namespace) -> None:
    refuse_foreign_launchers()
    from pave_lightning.recipe.finding import find_sweep

    path = find_sweep(options.name)  # before all that takes long to load
    from pave_lightning.pipeline import commands

    commands.read_recipe(path, options.set)  # what is wrong with it is told at once
    from pave_lightning.sweeps.running import run_sweep

    folder = run_sweep(options.name, options.set, verify=bool(options.verify))
    _out((folder / "findings.md").read_text().rstrip())
    _out(f"results: {folder}")


def _execute_recipe(command: str, options: Namespace) -> None:
    if command == "sweep":
        return _execute_sweep(options)
    if command == "merge" and _adds_expert(options):
        return _out(f"results: {_add_expert(options)}")
    refuse_foreign_launchers()
    from pave_lightning.recipe.finding import find_recipe, shipped_recipe

    if command == "quickstart":
        command, (given, path) = "run", shipped_recipe(command)
    else:
        given, path = options.recipe, find_recipe(options.recipe)  # before all that takes long to load
    from pave_lightning.pipeline import commands
    from pave_lightning.recipe.loading import recipe_to_yaml

    task = _once(options, "task") if command in PER_TASK else None
    recipe = commands.read_recipe(path, options.set)
    if options.print_config:
        return _out(recipe_to_yaml(recipe).rstrip())
    if command == "plan" and recipe.sweep is not None:
        from pave_lightning.sweeps.running import plan_sweep

        return plan_sweep(str(path), options.set, verify=bool(options.verify))
    if command == "run":
        if recipe.sweep is not None:
            _say(f"note: what the recipe's sweep varies is run by `pave sweep {given}`, not here")
        commands.run_recipe(recipe, verify=bool(options.verify), allow_code=bool(options.allow_code_execution))
    elif command == "plan":
        from pave_lightning.system.collecting import seldom_collected

        with seldom_collected():
            allow_code = bool(options.allow_code_execution)
            commands.plan_recipe(recipe, verify=bool(options.verify), allow_code=allow_code)
    else:
        allow_code = command in EVALUATING and bool(options.allow_code_execution)
        commands.run_stage(recipe, command, task, allow_code=allow_code)
    return None


def _adds_expert(options: Namespace) -> bool:
    return options.recipe is None or bool(
        options.into or options.add or options.output or options.fisher or options.accept
    )


def _add_expert(options: Namespace) -> str:
    """``pave merge --into MERGED --add TASK=EXPERT``, which needs no recipe."""
    from pave_lightning.errors import PaveError

    if options.recipe is not None:
        raise PaveError(
            "give either a recipe, or --into MERGED --add TASK=EXPERT [--output FOLDER] [--fisher FILE], not both"
        )
    if options.set or options.print_config:
        raise PaveError("--set and --print-config go with a recipe, not with --into MERGED --add TASK=EXPERT")
    instead = "add one expert after the other, each with --into the result before"
    into, add = _once(options, "into"), _once(options, "add", instead)
    if into is None and add is None:
        raise PaveError("give a recipe, or add an expert to a merged model: --into MERGED --add TASK=EXPERT")
    task, _, expert = (add or "").partition("=")
    if not (into and task and expert):
        raise PaveError("to add an expert to a merged model give both --into MERGED and --add TASK=EXPERT")
    output = _once(options, "output") or f"{into.rstrip('/')}-{task}"
    fisher = _once(options, "fisher")
    from pave_lightning.pipeline.adding import add_expert

    return str(add_expert(into, task, expert, output, fisher, accept=options.accept))


def _convert(options: Namespace) -> None:
    """``pave convert SOURCE OUTPUT``."""
    from pathlib import Path

    from pave_lightning.config import options_of
    from pave_lightning.errors import PaveError
    from pave_lightning.system.references import HubModel
    from pave_lightning.weights.converting import convert_checkpoint

    named = {name: given for name in ("folder", "revision") if (given := _once(options, name)) is not None}
    if named and Path(options.source).expanduser().exists():
        verb = "goes" if len(named) == 1 else "go"
        raise PaveError(f"--{' and --'.join(named)} {verb} with a hub id, but {options.source} is on this machine")
    hub = options_of(HubModel, {"hub": options.source, **named}, "the source") if named else None
    convert_checkpoint(hub or options.source, Path(options.output).expanduser())
    _out(f"results: {options.output}")


def _once(options: Namespace, name: str, instead: str = "leave all but one out") -> str | None:
    """The value of an option that has one; None where it is not given."""
    from pave_lightning.errors import PaveError

    given: list[str] = options[name]
    if len(given) > 1:
        raise PaveError(f"--{name} takes one value, found {', '.join(given)}; {instead}")
    return given[0] if given else None


def _configure_output(debug: bool) -> None:
    """Show our own messages; the libraries' notices and warnings stay away unless asked for."""
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    if isinstance(sys.stdout, io.TextIOWrapper):  # not every terminal has every letter
        sys.stdout.reconfigure(errors="backslashreplace")
    if not debug:
        for name, value in QUIET.items():  # for further processes as well
            os.environ.setdefault(name, value)
        if not sys.warnoptions:
            warnings.simplefilter("ignore")
    ours = logging.getLogger("pave_lightning")
    ours.handlers = [_handler(debug)]
    ours.setLevel(logging.DEBUG if debug else logging.INFO if is_rank_zero() else logging.WARNING)
    ours.propagate = False


def _handler(debug: bool) -> logging.Handler:
    """Messages as rich shows them in a terminal; in a file, or for another program, one unbroken line each."""
    handler: logging.Handler
    if sys.stderr.isatty():
        from rich.logging import RichHandler

        from pave_lightning.system.terminal import terminal

        handler = RichHandler(
            console=terminal(stderr=True), show_path=False, show_level=debug, log_time_format="[%H:%M:%S]", markup=False
        )
    else:
        handler = logging.StreamHandler()
        handler.setFormatter(_Visible("[%(asctime)s] %(message)s", "%H:%M:%S"))
    handler.addFilter(_WithoutSecrets())
    return handler


class _Visible(logging.Formatter):
    """Spells out what would act on a terminal: a message may quote a file."""

    def format(self, record: logging.LogRecord) -> str:
        return _visible(super().format(record))


def _out(text: str) -> None:
    sys.stdout.write(_visible(text) + "\n")


def _say(text: str) -> None:
    sys.stderr.write(_visible(without_secrets(text)) + "\n")


def _visible(text: str) -> str:
    from pave_lightning.errors import visible

    return visible(text)


def _show_traceback(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
    """A traceback without the passwords that messages in it may quote."""
    _say("".join(traceback.format_exception(kind, error, trace)).rstrip())


class _WithoutSecrets(logging.Filter):
    """Leaves the passwords out of log messages that quote a URI."""

    def filter(self, record: logging.LogRecord) -> bool:
        record.msg, record.args = without_secrets(record.getMessage()), ()
        return True


def _version() -> str:
    from pave_lightning import __version__

    return __version__
