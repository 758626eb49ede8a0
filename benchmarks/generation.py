"""Tokens per second of `pave_lightning.tasks.decoding.write`, beside transformers' `generate` called by hand.

Both go on from the same batch, greedily, for as many tokens; they take turns, and CPU time of this process is counted,
so that what else the machine does matters less. With a stop string that never comes, texts are looked at after every
token.

Run alone: ``python benchmarks/generation.py FOLDER``. The last line of output is one JSON object.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from pave_lightning.tasks.decoding import write

NEVER = ["a text that no model writes"]


def main() -> None:
    arguments = parse_arguments()
    torch.set_num_threads(arguments.threads)
    model = AutoModelForCausalLM.from_pretrained(arguments.folder, dtype=torch.float32).eval()
    tokenizer = AutoTokenizer.from_pretrained(arguments.folder)
    model.generation_config.eos_token_id = model.config.eos_token_id = None  # so that all write as many tokens
    shape = (arguments.batch, arguments.prompt)
    ids = torch.randint(5, len(tokenizer) - 5, shape, generator=torch.Generator().manual_seed(0))
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    most = arguments.tokens

    def by_hand() -> object:
        with torch.no_grad():
            return model.generate(**inputs, do_sample=False, max_new_tokens=most, pad_token_id=tokenizer.pad_token_id)

    ways: dict[str, Callable[[], object]] = {
        "generate": by_hand,
        "write": lambda: write(model, inputs, tokenizer, most=most),
        "write, stop string": lambda: write(model, inputs, tokenizer, most=most, stop=NEVER),
    }
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    for _ in range(arguments.repeats + 1):  # the first time is left out
        for name, way in ways.items():
            start = time.process_time()
            way()
            seconds[name].append(time.process_time() - start)
    best = {name: min(values[1:]) for name, values in seconds.items()}
    for name, value in best.items():
        print(f"{name:20s} {arguments.batch * most / value:8.1f} tokens/s, {best['generate'] / value:.3f}x", flush=True)
    print(json.dumps({"shape": shape, "tokens": most, "seconds": best}))


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("folder", type=Path, help="folder of a causal language model")
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--prompt", type=int, default=24)
    parser.add_argument("--tokens", type=int, default=16)
    parser.add_argument("--repeats", type=int, default=2)
    parser.add_argument("--threads", type=int, default=1)
    return parser.parse_args()


if __name__ == "__main__":
    main()
