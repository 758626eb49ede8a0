from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import get_args

import pytest

from pave_lightning.errors import PaveError
from pave_lightning.recipe.loading import load_recipe
from pave_lightning.recipe.schema import Recipe
from pave_lightning.tasks.options import MetricName

Write = Callable[[str], Path]
Problems = Callable[..., list[str]]
SchemaErrors = Callable[[str], list[str]]

START = "name: demo\nbase: folder\n"
SMALL = START + "tasks: [pocket/movie]\n"

# --- wrong keys and values --------------------------------------------------------------------------------------------

WRONG = [
    # unknown keys
    ("sead: 1", ["sead: unknown key; did you mean 'seed'?"]),
    ("training: {lr: 1}", ["training.lr: unknown key; did you mean 'learning_rate'?"]),
    ("training: {learning_rat: 1}", ["training.learning_rat: unknown key; did you mean 'learning_rate'?"]),
    ("training: {lora: {rnk: 1}}", ["training.lora.rnk: unknown key; did you mean 'rank'?"]),
    ("examples: {valid: 5}", ["examples.valid: unknown key; did you mean 'validation'?"]),
    ("evaluate: {zzz: 5}", ["evaluate.zzz: unknown key; known are: batch_size, precision, purified_experts, lm_eval"]),
    ("learning_rate: 3", ["learning_rate: unknown key; it belongs under 'training'"]),
    ("training: {rho: 1}", ["training.rho: unknown key; it belongs under 'purify'"]),
    ("label: x", ["label: unknown key; it belongs under 'tasks.N'"]),
    (
        "training: {max_epochs: 3}",
        ["training.max_epochs: unknown key; it is an option of lightning.Trainer and belongs under 'trainer'"],
    ),
    # numbers
    ("seed: yes", ["seed: must be a whole number in [0, 2147483647], found 'yes'"]),
    ("seed: true", ["seed: must be a whole number in [0, 2147483647], found true"]),
    ("seed: 1.5", ["seed: must be a whole number in [0, 2147483647], found 1.5"]),
    ("seed: -1", ["seed: -1 is outside [0, 2147483647]"]),
    ("seed: .inf", ["seed: must be a finite number, found .inf"]),
    (
        "seed: null",
        ["seed: must be a whole number in [0, 2147483647], found nothing; give it a value or leave the key out"],
    ),
    ("seed: 99999999999999999999", ["seed: 99999999999999999999 is outside [0, 2147483647]"]),
    ("capture: {examples: 1e3}", ["capture.examples: must be a whole number, at least 1, found 1000.0; write 1000"]),
    ("purify: {rho: 1.5}", ["purify.rho: 1.5 is outside (0, 1]"]),
    ("purify: {rho: 0}", ["purify.rho: 0 is outside (0, 1]"]),
    ("purify: {rho: true}", ["purify.rho: must be a number in (0, 1], or auto, found true"]),
    ("purify: {rho: '0.5'}", ["purify.rho: must be a number in (0, 1], or auto, found '0.5'; leave the quotes out"]),
    ("purify: {rho: .nan}", ["purify.rho: must be a finite number, found .nan"]),
    ("purify: {damping: -0.1}", ["purify.damping: must be at least 0, found -0.1"]),
    ("training: {learning_rate: 0}", ["training.learning_rate: must be above 0, found 0"]),
    ("training: {lora: {dropout: 1}}", ["training.lora.dropout: 1 is outside [0, 1)"]),
    ("training: {batch_size: 0}", ["training.batch_size: must be at least 1, found 0"]),
    (
        "examples: {train: 0, test: 1}",
        ["examples.train: must be at least 1, found 0", "examples.test: must be at least 2, found 1"],
    ),
    # words
    ("output: 5", ["output: must be a text, found 5; put it in quotes"]),
    ("evaluate: {precision: 32}", ["evaluate.precision: must be a text, found 32; put it in quotes"]),
    ("output: 2024-01-01", ["output: 2024-01-01 is read as a date; put it in quotes to make it a text"]),
    ("tracking: {upload_models: 1}", ["tracking.upload_models: must be true or false, found 1"]),
    ("tracking: {upload_models: yes}", ["tracking.upload_models: must be true or false, found 'yes'"]),
    ("purify: {metric: covarianc}", ["purify.metric: 'covarianc' is not allowed; did you mean 'covariance'?"]),
    ("purify: {metric: zzz}", ["purify.metric: 'zzz' is not allowed; known are: covariance, root, identity"]),
    ("capture: {moments: true}", ["capture.moments: true is not allowed; known are: smallest, input, output"]),
    # sections and lists
    (
        "training: 5",
        ["training: must be a mapping with keys such as learning_rate, head_learning_rate, weight_decay, found 5"],
    ),
    (
        "capture:",
        [
            "capture: must be a mapping with keys such as examples, batch_size, source, found nothing; "
            "give it a value or leave the key out"
        ],
    ),
    ("trainer: cpu", ["trainer: must be a mapping of options, found 'cpu'"]),
    ("trainer: {1: 2}", ["trainer.1: the key 1 is not a text; put it in quotes"]),
    ("purify: {1: 2}", ["purify.1: the key 1 is not a text; put it in quotes"]),
    ("trainer: {a: {b: .nan}}", ["trainer.a.b: must be a finite number, found .nan"]),
    (
        "trainer: {a: !!binary aGk=}",
        ["trainer.a: is neither a mapping, a list, a text, a number, true, false nor null"],
    ),
    (
        "training: {freeze: embeddings}",
        ["training.freeze: must be a list of texts, found 'embeddings'; write [embeddings]"],
    ),
    ("training: {freeze: [1]}", ["training.freeze.0: must be a text, found 1; put it in quotes"]),
    (
        "training: {lora: {target_modules: query}}",
        ["training.lora.target_modules: must be a list of texts or 'all-linear', found 'query'; write [query]"],
    ),
    (
        "training: {lora: {target_modules: 5}}",
        ["training.lora.target_modules: must be a list of texts or 'all-linear', found 5"],
    ),
    (
        "training: {lora: {target_modules: [q, 5]}}",
        ["training.lora.target_modules.1: must be a text, found 5; put it in quotes"],
    ),
    ("purify: {tasks: []}", ["purify.tasks: needs at least 1 entry, found 0"]),
    ("purify: {tasks: [movi]}", ["purify.tasks: no task is named 'movi'; did you mean 'movie'?"]),
    # options to choose, and what sweeps vary
    (
        "merge: [{method: x, tune: {density: 0.1}}]",
        ["merge.0 (x).tune.density: must be a list of values, found 0.1; write [0.1]"],
    ),
    (
        "merge: [{method: x, tune: {density: {low: 0.1}}}]",
        ["merge.0 (x).tune.density: must be a list of values, found {low: 0.1}"],
    ),
    (
        "sweep: {question: q, vary: {seed: true}}",
        ["sweep.vary.seed: must be a list of values, found true; write [true]"],
    ),
    (
        "sweep: {question: q, seeds: 0}",
        ["sweep.seeds: must be a list of whole numbers, found 0; write [0]"],
    ),
    (
        "sweep: {question: q, seeds: all}",
        ["sweep.seeds: must be a list of whole numbers, found 'all'"],
    ),
    # merge steps
    ("merge: average", ["merge: must be a list of merge steps, found 'average'; write [average]"]),
    ("merge: {method: average}", ["merge: must be a list of merge steps, found {method: 'average'}"]),
    ("merge: [5]", ["merge.0: must be the name of a merge method, or a mapping with the key 'method', found 5"]),
    (
        "merge: [null]",
        ["merge.0: must be the name of a merge method, or a mapping with the key 'method', found nothing"],
    ),
    ("merge: [{methd: ties}]", ["merge.0.methd: unknown key; did you mean 'method'?"]),
    ("merge: [{scale: 1}]", ["merge.0: the key 'method' is missing (the merge method; `pave methods` lists them)"]),
    ("merge: [{method: 5}]", ["merge.0.method: must be the name of a merge method, found 5; put it in quotes"]),
    (
        "merge: [my method]",
        ["merge.0 (my method): 'my method' is no name: use letters, digits, '_', '.' and '-', a letter or digit first"],
    ),
    (
        "merge: [{method: my method}]",
        [
            "merge.0 (my method).method: "
            "'my method' is no name: use letters, digits, '_', '.' and '-', a letter or digit first"
        ],
    ),
    ("merge: [{method: x, name: 0}]", ["merge.0 (x).name: must be a text, found 0; put it in quotes"]),
    (
        "merge: [{method: x, scale: true}]",
        ["merge.0 (x).scale: must be a number, search, or {search: [lowest, highest]}, found true"],
    ),
    (
        "merge: [{method: x, scale: [0, 1]}]",
        ["merge.0 (x).scale: must be a number, search, or {search: [lowest, highest]}, found [0, 1]"],
    ),
    (
        "merge: [{method: x, scale: '1'}]",
        ["merge.0 (x).scale: must be a number, search, or {search: [lowest, highest]}, found '1'"],
    ),
    ("merge: [{method: x, scale: {serch: [0, 1]}}]", ["merge.0 (x).scale.serch: unknown key; did you mean 'search'?"]),
    (
        "merge: [{method: x, scale: {}}]",
        ["merge.0 (x).scale: the key 'search' is missing (lowest and highest scale that is tried; or auto)"],
    ),
    (
        "merge: [{method: x, scale: {search: auto, points: 3}}]",
        ["merge.0 (x).scale: 'points' belongs to a range [lowest, highest], not to auto"],
    ),
    (
        "merge: [{method: x, scale: {search: atuo}}]",
        ["merge.0 (x).scale.search: must be two numbers [lowest, highest], or auto, found 'atuo'"],
    ),
    (
        "merge: [{method: x, scale: {search: [1, 0]}}]",
        ["merge.0 (x).scale.search: must be [lowest, highest], found [1, 0]"],
    ),
    (
        "merge: [{method: x, scale: {search: [1]}}]",
        ["merge.0 (x).scale.search: must be two numbers [lowest, highest], or auto, found [1]"],
    ),
    (
        "merge: [{method: x, scale: {search: [1, 2, 3]}}]",
        ["merge.0 (x).scale.search: must be two numbers [lowest, highest], or auto, found [1, 2, 3]"],
    ),
    (
        "merge: [{method: x, scale: {search: [a, true]}}]",
        [
            "merge.0 (x).scale.search.0: must be a number, found 'a'",
            "merge.0 (x).scale.search.1: must be a number, found true",
        ],
    ),
    (
        "merge: [{method: x, scale: {search: [0, 1], points: 1}}]",
        ["merge.0 (x).scale.points: 1 is outside [2, 1000]"],
    ),
    (
        "merge: [{method: x, vectors: plain}]",
        ["merge.0 (x).vectors: must be a list of plain, purified and names of stacks, found 'plain'; write [plain]"],
    ),
    (
        "merge: [{method: x, vectors: [pure]}]",
        ["merge step 'x': vectors: no stack is named 'pure'; did you mean 'purified'?"],
    ),
    ("merge: [{method: x, vectors: []}]", ["merge.0 (x).vectors: needs at least 1 entry, found 0"]),
    (
        "merge: [{method: x, vectors: [plain, plain]}]",
        ["merge.0 (x).vectors: must not name the same vectors twice, found ['plain', 'plain']"],
    ),
    ("merge: [{method: x, purify: {rho: 2}}]", ["merge.0 (x).purify.rho: 2 is outside (0, 1]"]),
    ("merge: [{method: x, options: [1]}]", ["merge.0 (x).options: must be a mapping of options, found [1]"]),
    ("merge: [{use: ties}]", ["merge.0 (ties).use: unknown key; did you mean 'method'?"]),
    ("merge: [ties, ties]", ["each merge step needs a name of its own, but ties stands twice; give one a 'name'"]),
    ("merge: [base]", ["a merge step cannot be named 'base': the tables use that name"]),
]


@pytest.mark.parametrize(("text", "told"), WRONG)
def test_wrong_keys_and_values(recipe_problems: Problems, text: str, told: list[str]) -> None:
    assert recipe_problems(f"{SMALL}{text}\n") == told


OWN = "name: own, data: {train: a.csv}, text: body"
NO_TASK = "tasks.0: the key 'use' with the name of a known task is missing, or else the keys name, data and text"
WRONG_TASKS = [
    ("[]", ["tasks: needs at least 1 entry, found 0"]),
    ("pocket/movie", ["tasks: must be a list of tasks, found 'pocket/movie'; write [pocket/movie]"]),
    ("{movie: {}}", ["tasks: must be a list of tasks, found {movie: {}}"]),
    ("[pocket/movi]", ["tasks.0 (movi): unknown task 'pocket/movi'; did you mean 'pocket/movie'?"]),
    ("[movie]", ["tasks.0 (movie): unknown task 'movie'; did you mean 'pocket/movie'?"]),
    (
        "[{use: glue/sst3, label: 5}]",
        [
            "tasks.0 (sst3).use: unknown task 'glue/sst3'; did you mean 'glue/sst2'?",
            "tasks.0 (sst3).label: must be a text, found 5; put it in quotes",
        ],
    ),
    ("[{use: 3}]", ["tasks.0.use: must be the name of a known task, such as pocket/movie, found 3"]),
    (
        "[{use: [pocket/movie]}]",
        ["tasks.0.use: must be the name of a known task, such as pocket/movie, found ['pocket/movie']"],
    ),
    ("[7]", ["tasks.0: must be the name of a task such as pocket/movie, or a mapping that describes one, found 7"]),
    (
        "[null]",
        ["tasks.0: must be the name of a task such as pocket/movie, or a mapping that describes one, found nothing"],
    ),
    ("[pocket/isa, {use: pocket/movie, metrik: f1}]", ["tasks.1 (movie).metrik: unknown key; did you mean 'metrics'?"]),
    (
        "[{use: pocket/movie, learning_rate: 1}]",
        ["tasks.0 (movie).learning_rate: unknown key; it belongs under 'training'"],
    ),
    (
        "[{use: pocket/movie, training: {learning_rat: 1}}]",
        ["tasks.0 (movie).training.learning_rat: unknown key; did you mean 'learning_rate'?"],
    ),
    (
        "[{use: pocket/movie, training: null}]",
        [
            "tasks.0 (movie).training: must be a mapping with keys such as "
            "learning_rate, head_learning_rate, weight_decay, found nothing; give it a value or leave the key out"
        ],
    ),
    ("[{use: pocket/movie, data: {trian: x}}]", ["tasks.0 (movie).data.trian: unknown key; did you mean 'train'?"]),
    ("[{use: pocket/movie, trainer: 5}]", ["tasks.0 (movie).trainer: must be a mapping of options, found 5"]),
    (
        "[{us: pocket/movie, name: movie, data: {}, text: t, classes: 2}]",
        ["tasks.0 (movie).us: unknown key; did you mean 'use'?"],
    ),
    ("[{}]", [NO_TASK]),
    ("[{name: own, classes: 2}]", [NO_TASK.replace("tasks.0", "tasks.0 (own)")]),
    (
        "[{name: own, data: {}, classes: 2}]",
        [
            "tasks.0 (own): the key 'text' is missing (the column that holds the text, "
            "or the two columns of a text pair)"
        ],
    ),
    ("[{nme: own, data: {}, text: t, classes: 2}]", ["tasks.0.nme: unknown key; did you mean 'name'?"]),
    (
        f"[{{{OWN}}}]",
        ["tasks.0 (own): a text_classification task needs 'classes': their number, or their names in index order"],
    ),
    (f"[{{{OWN}, clases: 2}}]", ["tasks.0 (own).clases: unknown key; did you mean 'classes'?"]),
    (f"[{{{OWN}, classes: 1}}]", ["tasks.0 (own).classes: needs at least 2 entries, found 1"]),
    (
        f"[{{{OWN}, classes: true}}]",
        ["tasks.0 (own).classes: must be the number of classes, or a list of their names, found true"],
    ),
    (
        f"[{{{OWN}, classes: positive}}]",
        ["tasks.0 (own).classes: must be the number of classes, or a list of their names, found 'positive'"],
    ),
    (
        f"[{{{OWN}, classes: [null, [b]]}}]",
        [
            "tasks.0 (own).classes.0: must be a text, found nothing",
            "tasks.0 (own).classes.1: must be a text, found ['b']",
        ],
    ),
    (
        "[{name: own, data: {train: a.csv, quoting: non}, text: body, classes: 2}]",
        ["tasks.0 (own).data.quoting: 'non' is not allowed; did you mean 'none'?"],
    ),
    (
        "[{name: own, data: {train: a.csv, delimiter: 3}, text: body, classes: 2}]",
        ["tasks.0 (own).data.delimiter: must be a text, found 3; put it in quotes"],
    ),
    (
        "[{name: own, data: {train: a.csv, delimiter: '||'}, text: body, classes: 2}]",
        [
            "tasks.0 (own).data: 'delimiter' must be one character, and no quotation mark or line break, found '||'; "
            'a tab is written "\\t", in double quotes'
        ],
    ),
    (
        "[{name: own, data: {train: a.jsonl, quoting: none, delimiter: ';'}, text: body, classes: 2}]",
        ["tasks.0 (own).data: 'quoting' and 'delimiter' only concern .csv and .tsv files"],
    ),
    (
        "[{name: own, data: {hub: a/b, quoting: none}, text: body, classes: 2}]",
        ["tasks.0 (own).data: 'quoting' only concerns .csv and .tsv files"],
    ),
    (f"[{{{OWN}, classes: [a, a]}}]", ["tasks.0 (own): the names in 'classes' must differ"]),
    (
        f"[{{{OWN}, classes: 2, metrics: acuracy}}]",
        ["tasks.0 (own).metrics: 'acuracy' is not allowed; did you mean 'accuracy'?"],
    ),
    (
        f"[{{{OWN}, classes: 2, metrics: [f1, acuracy]}}]",
        ["tasks.0 (own).metrics.1: 'acuracy' is not allowed; did you mean 'accuracy'?"],
    ),
    (
        f"[{{{OWN}, classes: 2, metrics: 3}}]",
        ["tasks.0 (own).metrics: must be the name of a metric, or a list of names, found 3"],
    ),
    (f"[{{{OWN}, classes: 2, metrics: []}}]", ["tasks.0 (own).metrics: needs at least 1 entry, found 0"]),
    (
        f"[{{{OWN}, classes: 2, primary_metric: zzz}}]",
        [f"tasks.0 (own).primary_metric: 'zzz' is not allowed; known are: {', '.join(get_args(MetricName))}"],
    ),
    (
        f"[{{{OWN}, classes: 2, primary_metric: f1}}]",
        ["tasks.0 (own): the primary metric 'f1' is not among the metrics accuracy"],
    ),
    (f"[{{{OWN}, classes: 3, metrics: f1}}]", ["tasks.0 (own): 'f1' is for two classes; for more use 'macro_f1'"]),
    (f"[{{{OWN}, kind: regresion}}]", ["tasks.0 (own).kind: 'regresion' is not allowed; did you mean 'regression'?"]),
    (f"[{{{OWN}, kind: regression, value_range: [5, 0]}}]", ["tasks.0 (own): 'value_range' must be [lowest, highest]"]),
    (
        f"[{{{OWN}, kind: regression, value_range: 5}}]",
        ["tasks.0 (own).value_range: must be two numbers [lowest, highest], found 5"],
    ),
    (
        f"[{{{OWN}, kind: regression, value_range: [0]}}]",
        ["tasks.0 (own).value_range: must be two numbers [lowest, highest], found [0]"],
    ),
    (
        f"[{{{OWN}, kind: regression, value_range: [a]}}]",
        [
            "tasks.0 (own).value_range: must be two numbers [lowest, highest], found ['a']",
            "tasks.0 (own).value_range.0: must be a number, found 'a'",
        ],
    ),
    (
        f"[{{{OWN}, classes: 2, expert: a/b}}]",
        ["tasks.0 (own).expert: must be a mapping with keys such as from, adapter, accept, found 'a/b'"],
    ),
    (
        f"[{{{OWN}, classes: 2, expert: {{form: a/b}}}}]",
        ["tasks.0 (own).expert.form: unknown key; did you mean 'from'?"],
    ),
    (
        f"[{{{OWN}, classes: 2, expert: {{}}}}]",
        [
            "tasks.0 (own).expert: the key 'from' is missing "
            "(a fine-tuned model with the head of the task's kind, or a peft adapter of the base)"
        ],
    ),
    (
        "[{name: own, data: x.csv, text: 5, classes: 2}]",
        [
            "tasks.0 (own).data: must be a mapping with keys such as hub, config, revision, found 'x.csv'",
            "tasks.0 (own).text: must be the name of a column, or a list of one or two, found 5",
        ],
    ),
    ("[{name: own, data: {}, text: [a, b, c], classes: 2}]", ["tasks.0 (own).text: needs at most 2 entries, found 3"]),
    (
        "[{name: own, data: {}, text: [a, 5], classes: 2}]",
        ["tasks.0 (own).text.1: must be a text, found 5; put it in quotes"],
    ),
    (
        "[{name: own, data: {}, text: null, classes: 2}]",
        ["tasks.0 (own).text: must be the name of a column, or a list of one or two, found nothing"],
    ),
    ("[{name: 5, data: {}, text: a, classes: 2}]", ["tasks.0.name: must be a text, found 5; put it in quotes"]),
    (
        "[{name: a/b, data: {}, text: a, classes: 2}]",
        ["tasks.0 (b).name: 'a/b' is no name: use letters, digits, '_', '.' and '-', a letter or digit first"],
    ),
    ("[pocket/isa, pocket/isa]", ["each task needs a name of its own, but isa stands twice; give one a 'name'"]),
]


@pytest.mark.parametrize(("tasks", "told"), WRONG_TASKS)
def test_wrong_tasks(recipe_problems: Problems, tasks: str, told: list[str]) -> None:
    assert recipe_problems(f"{START}tasks: {tasks}\n") == told


def test_missing_keys_are_named(recipe_problems: Problems) -> None:
    assert recipe_problems("seed: 1\n") == [
        "the key 'name' is missing (name of the run; its folder is output/name)",
        "the key 'base' is missing (the common base model)",
        "the key 'tasks' is missing (the tasks)",
    ]


def test_everything_is_told_at_once_in_the_order_of_the_file(recipe_problems: Problems) -> None:
    text = """
name: a b
seed: yes
base: folder
training: {learning_rat: 1}
purify: {tasks: [movi], rho: 2}
tasks:
  - pocket/movie
  - pocket/movie
  - {use: pocket/isa, kind: regression, training: {batch_size: 0}}
  - {use: pocket/sense, training: {early_stopping: {patience: 0}}}
merge:
  - {method: ties, scale: true}
  - {method: average, name: base}
"""
    assert recipe_problems(text) == [
        "each task needs a name of its own, but movie stands twice; give one a 'name'",
        "purify.tasks: no task is named 'movi'; did you mean 'movie'?",
        "a merge step cannot be named 'base': the tables use that name",
        "name: 'a b' is no name: use letters, digits, '_', '.' and '-', a letter or digit first",
        "seed: must be a whole number in [0, 2147483647], found 'yes'",
        "training.learning_rat: unknown key; did you mean 'learning_rate'?",
        "purify.rho: 2 is outside (0, 1]",
        "tasks.2 (isa): 'classes' belongs to image_classification, multi_label, text_classification, "
        "token_classification and zero_shot_image tasks",
        "tasks.2 (isa): metric 'accuracy' does not fit a regression task; fitting are pearson, spearman",
        "tasks.2 (isa).training.batch_size: must be at least 1, found 0",
        "tasks.3 (sense).training.early_stopping.patience: must be at least 1, found 0",
        "merge.0 (ties).scale: must be a number, search, or {search: [lowest, highest]}, found true",
    ]


def test_a_mistake_in_a_shared_section_is_told_once(recipe_problems: Problems) -> None:
    text = START + (
        "training: {batch_size: 0, lora: {rank: 0}}\nexamples: {train: x}\npurify: {rho: 2}\n"
        "tasks: [pocket/movie, {use: pocket/isa, training: {batch_size: -1}}, pocket/sense]\nmerge: [average, ties]\n"
    )
    assert recipe_problems(text) == [
        "training.batch_size: must be at least 1, found 0",
        "training.lora.rank: must be at least 1, found 0",
        "examples.train: must be a whole number, at least 1, found 'x'",
        "purify.rho: 2 is outside (0, 1]",
        "tasks.1 (isa).training.batch_size: must be at least 1, found -1",
    ]


def test_more_than_twenty_problems_are_counted(recipe_problems: Problems) -> None:
    told = recipe_problems(SMALL + "".join(f"zzz{index}: 1\n" for index in range(25)))
    assert len(told) == 21
    assert told[-1].strip() == "... and 5 more"


def test_long_values_are_shortened(recipe_problems: Problems) -> None:
    (told,) = recipe_problems(f"{SMALL}seed: {'x' * 500}\n")
    assert len(told) < 140
    assert told.endswith("xxx...")


# --- merge methods and transforms, which recipes know nothing of ---


def lines_with_options(path: Path) -> list[str]:
    def judged(recipe: Recipe) -> Iterator[tuple[tuple[str | int, ...], str]]:
        for index, step in enumerate(recipe.merge):
            yield from ((("merge", index), f"{step.method} takes no {key}") for key in step.options)
        for name in recipe.vectors:
            for place, (kind, options) in enumerate(recipe.stack(name)):
                yield from ((("vectors", name, place), f"{kind} takes no {key}") for key in options)

    with pytest.raises(PaveError) as caught:
        load_recipe(path, option_problems=judged)
    return [line.removeprefix("  - ") for line in str(caught.value).splitlines()[1:]]


def test_keys_of_an_sweep_that_do_not_agree_are_told_without_the_whole_section(recipe_problems: Problems) -> None:
    text = SMALL + "sweep: {question: What happens?, x: purify.rho, vary: {output: [a]}}\n"
    assert recipe_problems(text) == [
        "sweep: 'output' cannot be varied",
        "sweep: 'purify.rho' is no varied key; known are: output, model, vectors, heads",
    ]


def test_mistakes_of_the_recipe_do_not_hide_those_of_its_methods(write_recipe: Write) -> None:
    steps = "merge: [ties, {method: x, options: {a: 1}, tune: {b: 2}}, {method: y, options: {c: 1}}, 5]\n"
    assert lines_with_options(write_recipe(SMALL + "sead: 1\n" + steps)) == [
        "sead: unknown key; did you mean 'seed'?",
        "merge.1 (x): x takes no a",
        "merge.1 (x).tune.b: must be a list of values, found 2; write [2]",
        "merge.2 (y): y takes no c",
        "merge.3: must be the name of a merge method, or a mapping with the key 'method', found 5",
    ]


def test_mistakes_of_the_recipe_do_not_hide_those_of_its_transforms(write_recipe: Write) -> None:
    stacks = (
        "vectors: {one: [dare, {dare: {a: 1}}], two: [{pave: {b: 1}}, {dare: {}, pave: {}}], three: {dare: {c: 1}}}\n"
    )
    assert lines_with_options(write_recipe(SMALL + stacks + "sead: 1\n")) == [
        "vectors.one.1: dare takes no a",
        "vectors.two.0: pave takes no b",
        "vectors.two.1: must be the name of a transform, or {NAME: {...}} with its options",
        "vectors.three: must be a list of transforms, found {dare: {c: 1}}",
        "sead: unknown key; did you mean 'seed'?",
    ]


def test_options_of_a_recipe_that_is_right_are_left_to_others(write_recipe: Write) -> None:
    path = write_recipe(SMALL + "vectors: {one: [{x: {a: 1}}]}\nmerge: [{method: x, options: {a: 1}}]\n")
    assert load_recipe(path, option_problems=lambda recipe: pytest.fail("asked")).merge[0].method == "x"


# --- what the schema can tell -----------------------------------------------------------------------------------------

OUTSIDE_THE_SCHEMA = (
    "1e3",
    "[1, 0]",
    "auto, points",
    "movi]",
    "plain, plain",
    "my method",
    "name: 0",
    "[ties, ties]",
    "[base]",
    "[pure]",
    ".inf",
    ".nan",
)


@pytest.mark.parametrize("text", [text for text, _ in WRONG if not text.startswith(("trainer: ", "purify: {1"))])
def test_the_schema_refuses_what_can_be_told_without_reading_two_keys_together(
    schema_errors: SchemaErrors, text: str
) -> None:
    if not any(outside in text for outside in (*OUTSIDE_THE_SCHEMA, "2024")):
        assert schema_errors(f"{SMALL}{text}\n")


@pytest.mark.parametrize(
    ("base", "told"),
    [
        ("{hub: owner/name, where: x}", "base.where: unknown key; known are: hub, folder, revision, file"),
        ("{folder: last}", "base: the key 'hub' is missing (name of the repository, such as FacebookAI/roberta-base)"),
        ("{hub: a b}", "base.hub: must be the name of a repository, OWNER/NAME, found 'a b'"),
        (
            "{hub: a/b, folder: ../c}",
            "base.folder: must be a path inside of the repository, such as checkpoints/last, found '../c'",
        ),
        ("3", "base: must be a folder, a hub id, or a mapping such as {hub: OWNER/NAME, folder: last}, found 3"),
    ],
)
def test_wrong_names_of_models(recipe_problems: Problems, base: str, told: str) -> None:
    tasks = "[pocket/movie, pocket/tweet]"
    assert recipe_problems(f"name: x\nbase: {base}\ntasks: {tasks}\n") == [told]


def test_a_part_of_a_repository_is_written_as_it_was_read(read_recipe, write_recipe) -> None:
    from pave_lightning.recipe.loading import recipe_to_yaml

    base = "{hub: owner/name, folder: last, revision: v1}"
    tasks = "[{use: pocket/movie, expert: {from: {hub: owner/movie}}}, pocket/tweet]"
    recipe = read_recipe(f"name: x\nbase: {base}\ntasks: {tasks}\nvocabulary: union\n")
    assert str(recipe.base) == "hf://owner/name@v1/last"
    assert str(recipe.tasks[0].expert.from_) == "owner/movie"
    assert read_recipe(recipe_to_yaml(recipe)) == recipe


@pytest.mark.parametrize(
    ("options", "told"),
    [
        ("{r: 4}", "training.lora.r: unknown key; did you mean 'rank'?"),
        ("{lora_alpha: 4}", "training.lora.lora_alpha: unknown key; did you mean 'alpha'?"),
        ("{use_rlora: true}", "training.lora.use_rlora: unknown key; did you mean 'use_rslora'?"),
        ("{rank_pattern: {query: 0}}", "training.lora.rank_pattern.query: must be at least 1, found 0"),
        ("{rank_pattern: {'(': 3}}", "training.lora.rank_pattern"),
        ("{init_lora_weights: eva}", "training.lora.init_lora_weights: must be true, gaussian, orthogonal, mica"),
        ("{init_lora_weights: false}", "training.lora.init_lora_weights: must be true, gaussian, orthogonal, mica"),
        ("{target_modules: []}", "training.lora: 'target_modules' names nothing"),
        ("{use_dora: true, lora_bias: true}", "training.lora: 'use_dora' and 'lora_bias' exclude each other"),
        ("{bias: some}", "training.lora.bias: "),
    ],
)
def test_options_of_adapters(recipe_problems: Problems, options: str, told: str) -> None:
    (line,) = recipe_problems(START + f"tasks: [pocket/movie]\ntraining: {{lora: {options}}}\n")
    assert line.startswith(told)
