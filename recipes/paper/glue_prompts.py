"""Write GLUE as prompts and responses, in the words of FusionBench, for `flan_t5_glue_lora.yaml`.

Each row of a task becomes one of ``OUTPUT/TASK/SPLIT.jsonl``, with the keys prompt and response.
Source of the words: github.com/tanganke/fusion_bench, docs/modelpool/flan-t5_generation.md.
"""

import argparse
import json
from pathlib import Path
from tempfile import TemporaryDirectory

from pave_lightning import Task
from pave_lightning.tasks.data import SPLITS, load_split
from pave_lightning.tasks.suites import known_data, suite_task

YES_NO = ["no", "yes"]
# The prompt, with the places of the task's texts, and what is answered for each class.
WORDS: dict[str, tuple[str, list[str]]] = {
    "cola": (
        "Indicate if the following sentence is grammatically correct or not: \"{0}\". Answere 'acceptable' or "
        "'unacceptable'.",
        ["unacceptable", "acceptable"],
    ),
    "sst2": (
        "Given the sentence '{0}', determine the sentiment. Is it positive or negative?",
        ["negative", "positive"],
    ),
    "mrpc": (
        "Are the following sentences '{0}' and '{1}' conveying the same meaning? Answere with 'yes' or 'no'.",
        YES_NO,
    ),
    "stsb": (
        "Consider the sentences '{0}' and '{1}'. On a scale from 1 (completely different) to 5 (completely similar), "
        "rate the similarity.",
        [],
    ),
    "qqp": ("Do the questions '{0}' and '{1}' have the same intent? Answere with 'yes' or 'no'.", YES_NO),
    "mnli": (
        "Does the premise: '{0}' logically imply, contradict, or is neutral to the hypothesis: '{1}'? Answere with "
        "'entailment', 'contradiction', or 'neutral'.",
        ["entailment", "neutral", "contradiction"],
    ),
    "qnli": (
        "Given the context: '{1}', does the question '{0}' have an answer based on the information provided? Answer "
        "with 'yes' or 'no'.",
        ["yes", "no"],
    ),
    "rte": ("Does the text: '{0}' entail that '{1}' is true? Provide 'yes' or 'no'.", ["yes", "no"]),
}


def write_prompts(output: Path, folder: str | None = None) -> None:
    """Write all tasks and splits.

    Args:
        output: folder for them, made if it is not there.
        folder: a folder that holds GLUE in place of the hub, as ``data.folder`` of recipes.
    """
    for name, (prompt, words) in WORDS.items():
        known = suite_task(f"glue/{name}")
        data = known_data(known["data"], {} if folder is None else {"folder": folder})
        task: Task = Task.model_validate({**known, "data": data})
        (output / name).mkdir(parents=True, exist_ok=True)
        for split in SPLITS:
            with TemporaryDirectory() as copies:
                rows = load_split(task, split, seed=0, cache_dir=copies)
                texts = zip(*(rows.column(column).to_pylist() for column in task.text), strict=True)
                labels = task.answers(rows).tolist()
            with (output / name / f"{split}.jsonl").open("w", encoding="utf-8") as stream:
                for own, label in zip(texts, labels, strict=True):
                    response = words[label] if words else f"{label:.1f}"
                    stream.write(json.dumps({"prompt": prompt.format(*own), "response": response}) + "\n")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("output", type=Path, help="folder for the rows")
    parser.add_argument("--folder", help="folder that holds GLUE in place of the hub")
    arguments = parser.parse_args()
    write_prompts(arguments.output, arguments.folder)
