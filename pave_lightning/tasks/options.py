"""Options of a task: its data, its examples, and how its expert is fine-tuned or where it is."""

from __future__ import annotations

from typing import Literal

from pydantic import ConfigDict, Field, model_validator

from pave_lightning.config import Section, unless_wrong

MetricName = Literal[
    "accuracy",
    "f1",
    "macro_f1",
    "matthews",
    "micro_f1",
    "exact_match",
    "mean_average_precision",
    "token_f1",
    "pearson",
    "spearman",
]

# Most classes of one task; ImageNet-21k has 21,841.
MOST_CLASSES = 22_000


class Examples(Section):
    """How many rows of each split are used: a seeded sample, or every row where nothing is said."""

    train: int | None = Field(default=None, ge=1)
    """Rows of the training split that the expert is fine-tuned on."""
    validation: int | None = Field(default=None, ge=2)
    """Rows of the validation split (best checkpoint, scale search)."""
    test: int | None = Field(default=None, ge=2)
    """Rows of the test split (the reported scores)."""


class Data(Section):
    """Where a task's rows come from: local csv, jsonl or parquet files, or a dataset on the Hugging Face hub."""

    hub: str | None = None
    """Name of a hub dataset, such as nyu-mll/glue. Without it, train, validation and test are paths of local files."""
    config: str | None = None
    """Configuration of the hub dataset, such as sst2."""
    revision: str | None = None
    """Commit, tag or branch of the hub dataset."""
    train: str = "train"
    """Path of a local file, or a split of the hub dataset; slices such as train[:90%] are understood for the hub."""
    validation: str = "validation"
    """Path or split of the rows that choose the best checkpoint and the scales."""
    test: str = "test"
    """Path or split of the rows that are reported."""
    quoting: Literal["auto", "standard", "none"] = "auto"
    """What quotation marks mean in .csv and .tsv files. standard: they enclose fields, and stand doubled inside of
    them; none: they are plain characters; auto: standard for .csv; for .tsv none, unless each of them opens or closes
    a whole field on one line."""
    delimiter: str | None = None
    """The character between the columns of .csv and .tsv files; by default a comma (.csv) or a tab (.tsv)."""

    @model_validator(mode="after")
    def _agree(self) -> Data:
        wrong: list[str] = []
        if self.delimiter is not None and (len(self.delimiter) != 1 or self.delimiter in '"\r\n\0'):
            wrong.append(
                f"'delimiter' must be one character, and no quotation mark or line break, found {self.delimiter!r}; "
                'a tab is written "\\t", in double quotes'
            )
        files = [name for name in (self.train, self.validation, self.test) if name.lower().endswith((".csv", ".tsv"))]
        given = [f"'{key}'" for key in ("quoting", "delimiter") if getattr(self, key) != Data.model_fields[key].default]
        if given and (self.hub is not None or not files):
            wrong.append(
                f"{' and '.join(given)} only {'concerns' if len(given) == 1 else 'concern'} .csv and .tsv files"
            )
        return unless_wrong(self, wrong)


class Lora(Section):
    """Fine-tune low-rank adapters (peft) instead of all weights; at the end they are merged into the weights."""

    rank: int = Field(default=8, ge=1)
    """Rank r of the adapters."""
    alpha: float = Field(default=16.0, gt=0)
    """Scaling: the update is alpha / r times B A."""
    dropout: float = Field(default=0.0, ge=0, lt=1)
    """Dropout on the adapters' inputs."""
    target_modules: list[str] | Literal["all-linear"] = "all-linear"
    """Names (or name endings) of the linear layers that get an adapter."""


class EarlyStopping(Section):
    """Stop fine-tuning when the primary metric no longer rises."""

    patience: int = Field(default=2, ge=1)
    """Validation passes without a rise before training stops."""
    min_delta: float = Field(default=0.0, ge=0)
    """The least rise that counts."""


class Training(Section):
    """How an expert is fine-tuned: AdamW with linear warm-up and linear decay."""

    learning_rate: float = Field(default=3e-5, gt=0)
    """Peak learning rate of the backbone. Experts trained gently merge far better than those trained hard."""
    head_learning_rate: float = Field(default=2e-3, gt=0)
    """Peak learning rate of the head, which starts from random weights and is never merged."""
    weight_decay: float = Field(default=0.01, ge=0)
    """AdamW's decoupled weight decay; biases and norm weights are not decayed."""
    warmup_share: float = Field(default=0.06, ge=0, le=1)
    """Share of all steps in which the learning rate rises."""
    batch_size: int = Field(default=32, ge=1)
    """Examples a step and device."""
    max_length: int = Field(default=128, ge=4)
    """Longest sequence in tokens; longer texts are cut."""
    freeze: list[str] = []
    """Submodules of the backbone that are not trained, such as embeddings."""
    early_stopping: EarlyStopping | None = None
    """Stop early on the primary metric; without it all epochs run."""
    lora: Lora | None = None
    """Train adapters instead of all weights."""


class Expert(Section):
    """An expert that exists already."""

    model_config = ConfigDict(validate_by_name=True, validate_by_alias=True)

    from_: str = Field(alias="from")
    """Folder or hub id of a fine-tuned sequence-classification checkpoint (or of a peft adapter of the base)."""
    accept: list[str] = []
    """What may differ although it is refused otherwise; the message names it. Keys of config.json, such as rope_theta:
    merged models use the base's value, the expert is scored with its own. Or architectures, problem_type, id2label,
    label2id, unused_weights; for adapters base (trained on another base) and task_type."""
