"""The part of a recipe that `pave sweep` reads."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import Field, model_validator

from pave_lightning.config import MOST_TOLD, Section, unless_wrong
from pave_lightning.errors import nearest
from pave_lightning.recipe.limits import repeats


class Sweep(Section):
    """A recipe run many times with some keys varied; `pave sweep` compares the results."""

    question: str
    """What is to be found out, in one sentence."""
    seeds: list[int] = Field(default=[0, 1, 2], min_length=1)
    """Seeds of the recipe; experts are trained anew for each."""
    vary: dict[str, list[Any]] = {}
    """Keys of the recipe (as --set names them) and the values that each takes; every combination is run."""
    cases: dict[str, dict[str, Any]] = {}
    """Names of settings, each with the keys that it changes; combined with every value of vary."""
    x: str = ""
    """What stands on the picture's horizontal axis: a varied key, case, model, vectors, or heads where some are
    fitted; where nothing is said, the first varied key, or model where none is varied."""
    lines: list[str] = []
    """What tells the picture's lines apart; everything else that differs where nothing is said."""
    score: Literal["normalised", "raw"] = "normalised"
    """normalised: each task's score divided by its expert's; raw: the score itself."""
    log_x: bool = False
    """Whether the horizontal axis is logarithmic."""

    @model_validator(mode="after")
    def _agree(self) -> Sweep:
        wrong = [f"'{key}' takes no value" for key, values in self.vary.items() if not values]
        wrong += [f"'{key}' takes the same value twice" for key, values in self.vary.items() if repeats(values)]
        if len(set(self.seeds)) != len(self.seeds):
            wrong.append("the seeds must differ")
        fixed = {"name", "output", "shared", "tracking", "sweep"}
        keys = dict.fromkeys([*self.vary, *(key for changes in self.cases.values() for key in changes)])
        wrong += [f"'{key}' cannot be varied" for key in keys if key.partition(".")[0] in fixed]
        wrong += ["'seed' is varied by the key 'seeds'"] if "seed" in keys else []
        columns = [*self.vary, *(["case"] if self.cases else []), "model", "vectors", "heads"]
        wrong += [
            f"'{name}' is no varied key; {nearest(name, columns)}"
            for name in [*([self.x] if self.x else []), *self.lines][:MOST_TOLD]
            if name not in columns
        ]
        return unless_wrong(self, wrong)
