"""The section on how the best model is used: code that can be pasted."""

from __future__ import annotations

import json
import shlex
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from pave_lightning.reporting.page.content import Block, Code, Section, Text
from pave_lightning.reporting.scores import Model

TEXTS = ('["A text to classify."]', '["The text that goes with it."]')


@dataclass(frozen=True)
class BestModel:
    """A merged model whose use is shown.

    Args:
        model: What it is called in the tables.
        run: The run folder.
        folder: Its folder.
        task: A task whose head is taken in the code.
        texts: Of how many texts its task tells the class, one or two; 0 where it is another kind of task.
        fitted: Whether it has heads that were fitted to it.
        others: Further models of the run, by their folders below ``scores``.
    """

    model: Model
    run: str
    folder: str
    task: str
    texts: int
    fitted: bool = False
    others: Sequence[str] = ()


def use_section(best: BestModel | None) -> Section:
    """How to load the best merged model; empty where there is none."""
    return Section("use", "Use the best model", [] if best is None else list(_use(best)))


def _use(best: BestModel) -> Iterator[Block]:
    told = f"{best.model.name} ({best.model.vectors})" if best.model.vectors else best.model.name
    yield Text(
        [
            f"The best model with one set of weights for all tasks is {told}. It lies in {best.folder}: the backbone, "
            "and a head for each task. Run the code in the folder from which this recipe was run."
        ]
    )
    folder, task = _quoted(best.folder), _quoted(best.task)
    loads = f"from pave_lightning import load_merged\n\nmodel = load_merged({folder}, task={task})"
    if best.fitted:
        loads += "  # expert_head=True gives the expert's own head"
    if best.texts:
        loads = f"""\
import torch
from pave_lightning import load_merged
from transformers import AutoTokenizer

folder = {folder}
model = load_merged(folder, task={task})
tokenizer = AutoTokenizer.from_pretrained(folder)

rows = tokenizer({", ".join(TEXTS[: best.texts])}, padding=True, truncation=True, return_tensors="pt")
with torch.inference_mode():
    logits = model(**rows).logits
print([model.config.id2label[place] for place in logits.argmax(-1).tolist()])"""
    yield Code(loads, "One task, with its head")
    backbone = f"from transformers import AutoModel\n\nbackbone = AutoModel.from_pretrained({folder})"
    yield Code(backbone, "The backbone alone, without pave-lightning")
    name = best.folder.rsplit("/", 1)[-1]
    lines = [
        "# as one LoRA adapter of the base, with the head of this task",
        f"pave export {shlex.quote(best.run)} --model {shlex.quote(name)} --task {shlex.quote(best.task)} "
        f"--lora 16 --output {shlex.quote(f'{best.task}-lora')}",
    ]
    if best.others:
        lines += [
            "# row by row against another model of this run",
            f"pave compare {shlex.quote(best.run)} {shlex.quote(name)} {shlex.quote(best.others[0])}",
        ]
    yield Code("\n".join(lines), "On the command line", "shell")


def _quoted(text: str) -> str:
    """A text as Python writes it."""
    return json.dumps(text, ensure_ascii=False)
