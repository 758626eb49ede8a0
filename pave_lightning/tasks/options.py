"""Options of a task: its data, its examples, and how its expert is fine-tuned or where it is."""

from __future__ import annotations

import re
from typing import Annotated, Literal

from pydantic import AfterValidator, ConfigDict, Field, model_validator

from pave_lightning.config import Section, unless_wrong
from pave_lightning.system.patterns import pattern_problem
from pave_lightning.system.references import HubModel

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
    "contains",
    "perplexity",
    "bleu",
    "chrf",
    "rouge_1",
    "rouge_2",
    "rouge_l",
    "word_error_rate",
    "character_error_rate",
    "edit_distance",
]

LOWER_IS_BETTER: tuple[MetricName, ...] = (
    "perplexity",
    "word_error_rate",
    "character_error_rate",
    "edit_distance",
)

# Most classes of one task; ImageNet-21k has 21,841.
MOST_CLASSES = 22_000
# Starts that move a part of the base's weights into the factors.
CHANGE_THE_BASE = ("pissa", "olora")


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
    """Configuration of the hub dataset, such as sst2; with folder, the folder below it that holds the files."""
    revision: str | None = None
    """Commit, tag or branch of the hub dataset."""
    folder: str | None = None
    """A folder that holds a dataset's files by the names of splits (train.csv, train-00000-of-00001.parquet, for images
    train/CLASS/FILE), in place of the hub: train, validation and test are then splits too."""
    train: str = "train"
    """Path of a local file, or a split of the hub dataset or folder, of which slices such as train[:90%] are
    understood."""
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
        if self.folder is not None and self.hub is not None:
            wrong.append("'hub' and 'folder' exclude each other; leave one of them out")
        files = [name for name in (self.train, self.validation, self.test) if name.lower().endswith((".csv", ".tsv"))]
        files += [self.folder] if self.folder is not None else []
        given = [f"'{key}'" for key in ("quoting", "delimiter") if getattr(self, key) != Data.model_fields[key].default]
        if given and (self.hub is not None or not files):
            wrong.append(
                f"{' and '.join(given)} only {'concerns' if len(given) == 1 else 'concern'} .csv and .tsv files"
            )
        return unless_wrong(self, wrong)


def _pattern(key: str) -> str:
    if problem := pattern_problem(key):
        raise ValueError(problem)
    return key


def _start(value: bool | str) -> bool | str:
    known = ("gaussian", "orthogonal", "mica", "pissa", "olora")
    if value is True or value in known or re.fullmatch(r"pissa_niter_[1-9][0-9]{0,2}", str(value)):
        return value
    raise ValueError(
        f"must be true, {', '.join(known[:-1])}, pissa_niter_N with a number N, or {known[-1]}; starts that look at "
        "data (eva, corda, lora_ga) or at quantised weights (loftq) are trained with peft itself"
    )


Pattern = Annotated[str, Field(min_length=1), AfterValidator(_pattern)]


class Lora(Section):
    """Fine-tune low-rank adapters (peft) instead of all weights; at the end they are merged into the weights.

    Keys that are not explained in full mean what they mean in peft's LoraConfig, which has them under the same names
    (rank, alpha and dropout as r, lora_alpha and lora_dropout).
    """

    rank: int = Field(default=8, ge=1)
    """Rank r of the adapters."""
    alpha: float = Field(default=16.0, gt=0)
    """Scaling: the update is alpha / r times B A."""
    dropout: float = Field(default=0.0, ge=0, lt=1)
    """Dropout on the adapters' inputs."""
    target_modules: list[str] | Literal["all-linear"] = "all-linear"
    """Names (or name endings) of the modules that get an adapter: linear layers, convolutions and embeddings. Modules
    that are frozen or trained whole get none."""
    exclude_modules: list[str] = []
    """Names (or name endings) of modules that get no adapter although target_modules means them."""
    layers_to_transform: list[Annotated[int, Field(ge=0)]] | None = None
    """Numbers of the layers that get adapters, from 0; by default all layers."""
    target_parameters: list[str] = []
    """Names (or name endings) of parameters that get an adapter, such as the experts of a mixture
    (experts.gate_up_proj), which are no modules."""
    rank_pattern: dict[Pattern, Annotated[int, Field(ge=1)]] = {}
    """Other ranks of some modules: names, name endings or regular expressions of these. The first that fits counts."""
    alpha_pattern: dict[Pattern, Annotated[float, Field(gt=0)]] = {}
    """Other alphas of some modules, named like those of rank_pattern."""
    modules_to_save: list[str] = []
    """Names (or name endings) of modules of the backbone that are trained whole, such as LayerNorm or word_embeddings.
    The head is trained whole in any case."""
    trainable_token_indices: list[Annotated[int, Field(ge=0)]] = []
    """Tokens, by their numbers in the vocabulary, whose rows of the token embedding are trained."""
    bias: Literal["none", "all", "lora_only"] = "none"
    """Which biases of the base are trained: none, all, or those of adapted layers (lora_only)."""
    lora_bias: bool = False
    """Whether the adapters' factor B has a bias of its own."""
    use_rslora: bool = False
    """Whether the update is scaled by alpha / sqrt(r) (rank-stabilised LoRA)."""
    use_dora: bool = False
    """Whether direction and length of each output's weights are trained apart (DoRA)."""
    init_lora_weights: Annotated[bool | str, AfterValidator(_start)] = True
    """How the factors start: true (B is zero), gaussian, orthogonal, mica, or from the base's leading directions:
    pissa, pissa_niter_N (faster, with N iterations) or olora. The adapter that is written then holds the difference
    from this start, of twice the rank."""

    @model_validator(mode="after")
    def _agree(self) -> Lora:
        wrong = []
        if not self.target_modules and not self.target_parameters:
            wrong.append("'target_modules' names nothing, and neither does 'target_parameters'; name what is adapted")
        if self.lora_bias and self.use_dora:
            wrong.append("'use_dora' and 'lora_bias' exclude each other; leave one of them out")
        if self.lora_bias and self.init_lora_weights is not True:
            wrong.append(f"'lora_bias' goes with 'init_lora_weights' true only, found {self.init_lora_weights}")
        return unless_wrong(self, wrong)

    @property
    def changes_the_base(self) -> bool:
        """Whether a part of the base's weights moves into the factors before training."""
        return str(self.init_lora_weights).startswith(CHANGE_THE_BASE)


class EarlyStopping(Section):
    """Stop fine-tuning when the primary metric no longer rises."""

    patience: int = Field(default=2, ge=1)
    """Validation passes without a rise before training stops."""
    min_delta: float = Field(default=0.0, ge=0)
    """The least rise that counts."""


class Compile(Section):
    """Options of torch.compile, under the same names."""

    backend: str = "inductor"
    """What compiles: inductor, or another backend that PyTorch knows."""
    mode: Literal["default", "reduce-overhead", "max-autotune", "max-autotune-no-cudagraphs"] | None = None
    """How much effort is spent on fast kernels."""
    dynamic: bool | None = None
    """Whether sequences of any length share one graph; null: from the second length on."""
    fullgraph: bool = False
    """Whether a block that cannot be compiled as one graph is an error."""


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
    activation_checkpointing: bool = False
    """Keep only the inputs of each block for the backward pass, and recompute the rest: less memory, a third slower."""
    compile: bool | Compile = False
    """Compile the blocks of the model while training (torch.compile): true, or options of torch.compile."""


class Expert(Section):
    """An expert that exists already."""

    model_config = ConfigDict(validate_by_name=True, validate_by_alias=True)

    from_: str | HubModel = Field(alias="from")
    """A fine-tuned model with the head of the task's kind, or a peft adapter of the base: a folder, a hub id,
    package:NAME/FOLDER, or {hub: OWNER/NAME, folder: ..., revision: ...}."""
    adapter: str | None = None
    """Which adapter is meant, where peft has saved several of one model in folders of their own below that one."""
    accept: list[str] = []
    """What may differ although it is refused otherwise; the message names it. Keys of config.json, such as rope_theta:
    merged models use the base's value, the expert is scored with its own. Or architectures, problem_type, id2label,
    label2id, unused_weights, text_side, pooling; for adapters base (trained on another base) and task_type."""
