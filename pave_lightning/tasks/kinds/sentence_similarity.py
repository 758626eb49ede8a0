"""Sentence similarity: how alike the meanings of two texts are, by their embeddings."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from pave_lightning.config import Span
from pave_lightning.tasks.heads import Likelihood, Misfit
from pave_lightning.tasks.kinds.sequences import SequencesTask, longest, nested, random_sequences
from pave_lightning.tasks.kinds.tokens import MASK, tokenise
from pave_lightning.tasks.options import MetricName
from pave_lightning.tasks.task import Batch, task_kind

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt
    from torch import Tensor, nn
    from transformers import PreTrainedTokenizerBase

    from pave_lightning.tasks.checks import LabelColumn
    from pave_lightning.tasks.labels import Reading
    from pave_lightning.tasks.profiles import Profile, Suggestion
    from pave_lightning.tasks.rows import Rows

# What sentence-transformers notes of the steps behind the backbone; those that a cosine of means allows.
MODULES, POOLING = "modules.json", "Pooling"
ALLOWED = ("Transformer", POOLING, "Normalize")


@task_kind
class SentenceSimilarity(SequencesTask):
    """The cosine similarity of two texts, each the mean of its tokens' states; squared error of the cosine.

    There is no head, so the whole model is merged.

    Source: Reimers & Gurevych, *Sentence-BERT*, EMNLP 2019 (arXiv 1908.10084), with mean pooling and the regression
    objective.
    """

    auto_model: ClassVar[str] = "AutoModel"
    peft_type: ClassVar[str] = "FEATURE_EXTRACTION"
    fitting_metrics: ClassVar[tuple[MetricName, ...]] = ("spearman", "pearson")
    default_metrics: ClassVar[tuple[MetricName, ...]] = ("spearman", "pearson")
    likelihood: ClassVar[Likelihood] = Likelihood.GAUSSIAN
    has_head: ClassVar[bool] = False

    kind: Literal["sentence_similarity"] = "sentence_similarity"
    """What is predicted: how alike the meanings of two texts are."""
    label: str = "label"
    """The column that holds the score, a number."""
    value_range: Span = (0.0, 1.0)
    """The score of unrelated texts, which are taught a cosine of 0, and of texts of one meaning, which are taught 1;
    scores outside are refused."""

    @classmethod
    def suggested(cls, profile: Profile, given: Mapping[str, Any]) -> Suggestion | None:
        """A pair of texts and a column of amounts, which regression is the likelier kind for."""
        from pave_lightning.tasks.profiles import Suggestion

        found = cls.judged(profile, given)
        if found is None or len(found[0]) != 2 or not found[1].is_numeric:
            return None
        text, label = found
        lowest, highest = min(label.distinct[0], 0), max(label.distinct[-1], 1)
        return Suggestion({"text": text, "label": label.name, "value_range": [lowest, highest]}, 10)

    def contradictions(self) -> Iterator[str]:
        """Other than two texts, or a range that is none."""
        yield from super().contradictions()
        if len(self.text) != 2:
            yield f"a {self.kind} task needs 'text' to name two columns, the two texts that are compared"
        if self.value_range[0] >= self.value_range[1]:
            yield "'value_range' must be [lowest, highest]"

    # ---- rows ------------------------------------------------------------------------------------------------------

    @property
    def labelled_by(self) -> dict[str, Any]:
        """The column of the scores, and their range."""
        return {**super().labelled_by, "value_range": list(self.value_range)}

    def label_column(self, rows: Rows, reading: Reading | None) -> LabelColumn:
        """The scores of one split."""
        from pave_lightning.tasks.checks import LabelColumn

        return LabelColumn(rows, self.label, reading, value_range=self.value_range)

    def row_labels(self, rows: Mapping[str, list[Any]]) -> npt.NDArray[np.float32]:
        """The cosines that are taught."""
        import numpy as np

        low, high = self.value_range
        return ((np.asarray(rows[self.label], dtype=np.float64) - low) / (high - low)).astype(np.float32)

    # ---- examples --------------------------------------------------------------------------------------------------

    def encode(self, rows: Mapping[str, list[Any]], processor: PreTrainedTokenizerBase) -> dict[str, Any]:
        """The tokens of both texts, each by itself, cosines, and the length of the longer text."""
        pairs = zip(*(rows[name] for name in self.text), strict=True)
        texts = [text for pair in pairs for text in pair]
        tokens = nested(tokenise(processor, texts, max_length=self.training.max_length), [2] * len(rows[self.label]))
        return {**tokens, "labels": self.row_labels(rows), "length": longest(tokens)}

    def random_examples(self, processor: PreTrainedTokenizerBase, count: int, seed: int) -> dict[str, list[Any]]:
        """Pairs of sequences of tokens drawn uniformly from the vocabulary; see `random_tokens`."""
        return random_sequences(processor, count, 2, self.training.max_length, seed)[0]

    # ---- models ----------------------------------------------------------------------------------------------------

    @property
    def output_size(self) -> int:
        """One cosine."""
        return 1

    def read_positions(self, batch: Batch) -> Tensor:
        """All tokens, of which the mean is taken."""
        return batch[MASK].bool()

    def outputs(self, model: nn.Module, batch: Batch) -> Tensor:
        """The cosine of each pair, float32 of shape ``(n, 1)``."""
        from torch.nn import functional

        states = model(**self.inputs(batch)).last_hidden_state.float()
        read = batch[MASK][..., None].to(states.dtype)
        means = (states * read).sum(dim=1) / read.sum(dim=1).clamp(min=1)
        return functional.cosine_similarity(means[0::2], means[1::2])[:, None]

    def chosen(self, outputs: Tensor) -> Tensor:
        """The cosines themselves."""
        return outputs.squeeze(-1).float()

    def output_loss(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """Mean squared error of the cosines."""
        from torch.nn import functional

        return functional.mse_loss(outputs.squeeze(-1).float(), targets.float())

    def base_problem(self, config: Any) -> str | None:
        """An encoder and a decoder, whose last states are not those of the text."""
        if not config.is_encoder_decoder:
            return None
        return "has an encoder and a decoder, and a text is embedded by the states of one stack; use an encoder"

    def misfits(self, config: Any, written: Mapping[str, Any]) -> Iterator[Misfit]:
        """What a model of sentence-transformers does with its tokens' states besides taking their mean."""
        from pave_lightning.system.files import read_json, read_json_list

        folder = Path(str(config.name_or_path))
        steps = read_json_list(folder / MODULES) if (folder / MODULES).is_file() else []
        for step in (one for one in steps if isinstance(one, dict)):
            name = str(step.get("type", "")).rpartition(".")[2]
            if name not in ALLOWED:
                yield Misfit(
                    f"{MODULES} has a step {name} behind the backbone, which this kind of task has not", "pooling"
                )
            elif name == POOLING:
                settings = read_json(folder / str(step.get("path", "")) / "config.json")
                chosen = [key for key, value in settings.items() if key.startswith("pooling_mode_") and value is True]
                if chosen not in ([], ["pooling_mode_mean_tokens"]):
                    yield Misfit(
                        f"it was trained with {', '.join(chosen)}, and the task takes the mean of the tokens", "pooling"
                    )
