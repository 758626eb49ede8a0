"""``pave export``: a merged model of a run in another form."""

from __future__ import annotations

from pathlib import Path

from rich.console import Console

from pave_lightning.errors import PaveError, nearest
from pave_lightning.merging.adapters import write_adapter
from pave_lightning.merging.folders import FACTS_FILE
from pave_lightning.pipeline.run_folder import MANIFEST
from pave_lightning.system.terminal import terminal

MERGED = "merged"


def merged_models(run: Path) -> list[str]:
    """The names of the merged models that a run folder holds.

    Raises:
        PaveError: it is no run folder, or holds none.
    """
    if not run.is_dir():
        raise PaveError(f"there is no folder {run}; give the folder of a run, such as checkpoints/quickstart")
    found = sorted(
        folder.name
        for folder in (run / MERGED).glob("*")
        if (folder / FACTS_FILE).is_file() and (folder / MANIFEST).is_file()
    )
    if not found:
        raise PaveError(
            f"{run} has no merged models; give the folder of a run, in which `pave run` or `pave merge` has left "
            f"{MERGED}/"
        )
    return found


def export(
    run: str | Path,
    model: str | None = None,
    output: str | Path | None = None,
    *,
    lora: int | None = None,
    task: str | None = None,
    keep_whole: bool = False,
    console: Console | None = None,
) -> None:
    """Write a merged model of a run in another form; without a name, print which there are.

    Args:
        run: the run folder.
        model: name of a merged model: its folder below ``merged``.
        output: folder of the result; it must not exist.
        lora: the largest rank of a layer, for one LoRA adapter of the base.
        task: a task whose head goes with it.
        keep_whole: whether an adapter keeps what has no low-rank factors as it is.
        console: where to print.

    Raises:
        PaveError: the folder or the model is not there, something is not said, or the model cannot be written so.
    """
    run, console = Path(run), console or terminal()
    names = merged_models(run)
    if model is None:
        console.print(f"merged models in {run}:", soft_wrap=True, highlight=False)
        for name in names:
            console.print(f"  {name}", soft_wrap=True, highlight=False)
        return
    if model not in names:
        raise PaveError(f"{run} has no merged model '{model}'; {nearest(model, names)}")
    if lora is None:
        raise PaveError("say in which form: --lora RANK writes one LoRA adapter of the base")
    if output is None:
        raise PaveError("say where the result goes: --output FOLDER")
    fit = write_adapter(output, run / MERGED / model, rank=lora, task=task, keep_whole=keep_whole)
    for line in fit.lines():
        console.print(line, soft_wrap=True, markup=False, highlight=False)
    console.print(f"results: {output}", soft_wrap=True, markup=False, highlight=False)
