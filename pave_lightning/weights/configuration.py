"""What two models' configurations compute differently, with all defaults filled in."""

from __future__ import annotations

import copy
import re
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pave_lightning.errors import listed
from pave_lightning.weights.empty_models import read_config

# Values that do not change what the weights of a backbone compute when the model is not trained. Names and versions:
_NAMES = (
    r"_?name_or_path|transformers_version|architectures|auto_map|_commit_hash|tokenizer_class|finetuning_task|prefix"
)
# What is computed with, and what is returned besides the result.
_WAYS = (
    r"(torch_)?dtype|use_bfloat16|_?attn_implementation.*|use_cache|cache_implementation|chunk_size_feed_forward|"
    r"pretraining_tp|torchscript|(use_)?return_dict|output_.*|gradient_checkpointing|reference_compile|"
    r"deterministic_flash_attn|tie_(word_embeddings|encoder_decoder)|experts_implementation"
)
# What acts while training only.
_TRAINING = (
    r".*dropout.*|.*_pdrop|.*layerdrop|drop(_path)?_rate|initializer_.*|init_std|init_method.*|router_(aux_loss_coef|"
    r"jitter_noise)|sparse_prediction|sparse_pred_.*|label_smoothing|decoder_bias|mem_len|use_mems_train"
)
# The head, which every expert brings with its own configuration.
_HEAD = r"id2label|label2id|_?num_labels|problem_type|classifier_.*|summary_.*|pooler_hidden_(act|size)|.*n_top"
# Generation, and the vocabulary, which is compared as a vocabulary.
_TEXT = (
    r"vocab_size|(pad|bos|eos|cls|sep|mask|unk)_token_id|task_specific_params|max_length|min_length|do_sample|"
    r"num_beams|num_return_sequences|early_stopping|no_repeat_ngram_size|length_penalty|temperature|top_[kp]|"
    r"repetition_penalty|bad_words_ids|suppress_tokens|begin_suppress_tokens|forced_[be]os_token_id"
)
_IRRELEVANT = re.compile("|".join((_NAMES, _WAYS, _TRAINING, _HEAD, _TEXT)))
# Read by transformers itself, whatever the architecture.
_ALWAYS_READ = ("quantization_config",)


@dataclass(frozen=True)
class Difference:
    """One value of the configuration that changes what a backbone computes.

    Attributes:
        key: its name in ``config.json``; with dots where it lies inside of another.
        base: the base's value.
        expert: the expert's value.
    """

    key: str
    base: Any
    expert: Any

    def accepted(self, accept: Collection[str]) -> bool:
        """Whether it is named: whole, by its last part, or by what it lies in."""
        parts = self.key.split(".")
        return any(name in accept for name in (self.key, parts[0], parts[-1]))


def differences_in_function(base: Any, expert: Any) -> list[Difference]:
    """The values that change what a backbone computes and differ between two configurations.

    Both are compared as transformers' class for the architecture completes them, so that a value that one file
    writes and the other leaves at its default is no difference. Names, versions, formats, dropout, caches, labels, the
    head, and what belongs to the vocabulary are left out. A key that the class does not know counts where both have it.

    Args:
        base: the base's configuration (`read_config`).
        expert: the expert's.
    """
    first, second = (_flattened(found.to_dict()) for found in (base, expert))
    if base.model_type != expert.model_type:  # the other keys do not mean the same
        return [Difference("model_type", base.model_type, expert.model_type)]
    known = _known(base)
    found = []
    for key in [*first, *(key for key in second if key not in first)]:
        compared = key.partition(".")[0] in known or (key in first and key in second)
        if compared and first.get(key) != second.get(key) and not _is_irrelevant(key, base):
            found.append(Difference(key, first.get(key), second.get(key)))
    return found


def config_differences(task: str, base: Path, expert: Path, accept: Collection[str] = ()) -> list[str]:
    """What an expert's configuration computes otherwise than the base's, in words for people.

    Args:
        task: the expert's task, for messages.
        base: folder of the base.
        expert: folder of the expert, a whole model.
        accept: keys whose difference is meant.

    Raises:
        PaveError: one of the two has no configuration that can be read.
    """
    own = read_config(expert)
    found = differences_in_function(read_config(base), own)
    if found and found[0].key == "model_type":
        other = found[0]
        return [
            f"task '{task}': model_type is {other.expert!r} in the expert's config.json, {other.base!r} in the base's; "
            "experts must be models of the base's own kind"
        ]
    return [
        f"task '{task}': {one.key} is {one.expert!r} in the expert's config.json, {one.base!r} in the base's, so the "
        "same weights compute something else; use an expert of this base, or set expert.accept: "
        f"[{one.key}] if this is meant (merged models use the base's value, the expert is scored with its own)"
        for one in found
        if not one.accepted(accept)
    ]


def merged_configuration(base: Path, expert: Path) -> Any:
    """The configuration of a merged model below an expert's head: the base's values for what the backbone computes.

    An expert that is a part of the base, as the vision encoder of CLIP, has the configuration of that part.

    Args:
        base: folder of the base.
        expert: folder of the expert.
    """
    origin, own = read_config(base), read_config(expert)
    if origin.model_type != own.model_type:
        return own
    for key in dict.fromkeys(one.key.partition(".")[0] for one in differences_in_function(origin, own)):
        if hasattr(origin, key):
            setattr(own, key, copy.deepcopy(getattr(origin, key)))
        else:
            delattr(own, key)
    return own


def architecture_problem(expert: Any, built: str) -> str | None:
    """Why a checkpoint is not of the class that it would be loaded as; None where it says nothing else.

    Args:
        expert: its configuration.
        built: name of the class that its configuration gives here.
    """
    named = [str(name) for name in expert.architectures or ()]
    plain = {re.sub(r"^(TF|Flax)", "", name) for name in named}
    if not named or built in plain:
        return None
    return f"config.json says that it is a {listed(named)}, and it would be used as a {built}"


def _is_irrelevant(key: str, base: Any) -> bool:
    last = key.rpartition(".")[2]
    if last == "eos_token_id" and base.is_encoder_decoder:  # the head reads the state at this token
        return False
    return any(_IRRELEVANT.fullmatch(part) for part in (last, key.partition(".")[0]))


def _known(config: Any) -> Collection[str]:
    """The keys that a configuration's class knows."""
    try:
        return {*type(config)().to_dict(), *_ALWAYS_READ}
    except Exception:  # a class that cannot be made without arguments, in any of the ways that classes of others have
        return {*config.to_dict(), *_ALWAYS_READ}


def _flattened(values: Mapping[str, Any], before: str = "") -> dict[str, Any]:
    return dict(_walked(values, before))


def _walked(values: Mapping[str, Any], before: str) -> Iterator[tuple[str, Any]]:
    for key, value in values.items():
        if isinstance(value, dict) and value:
            yield from _walked(value, f"{before}{key}.")
        else:
            yield f"{before}{key}", list(value) if isinstance(value, tuple) else value
