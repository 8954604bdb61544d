"""Tokens a second of the serving engine and of transformers' continuous batching, unguarded, on the same prompts.

    python benchmarks/continuous_batching.py --pairs 3

In pairs, one after the other. Prefix sharing is off in transformers' (a guard needs every prompt read whole). Greedy,
32 new tokens each, no end of text. A guard could not tell the sequences apart in its packed inputs anyway; this says
what that costs.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Sequence
from statistics import median
from typing import Any

from transformers import ContinuousBatchingConfig, GenerationConfig

from saeguard.bench.pairs import NEW, tokens_per_second
from saeguard.bench.serve import conversations
from saeguard.embedded import embedded_model, starter_set
from saeguard.generate import prompt_ids


def theirs(model: Any, tokenizer: Any, prompts: Sequence[Sequence[int]]) -> float:
    how = GenerationConfig(max_new_tokens=NEW, do_sample=False, eos_token_id=-1, pad_token_id=tokenizer.pad_token_id)
    batching = ContinuousBatchingConfig(
        allow_block_sharing=False, use_cuda_graph=False, num_blocks=256, max_batch_tokens=2048
    )
    began = time.perf_counter()
    out = model.generate_batch(
        inputs=[list(prompt) for prompt in prompts], generation_config=how, continuous_batching_config=batching
    )
    tokens = sum(len(answer.generated_tokens) for answer in out.values())
    assert tokens == NEW * len(prompts)
    return tokens / (time.perf_counter() - began)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--pairs", type=int, default=3)
    parser.add_argument("--prompts", type=int, default=16)
    parser.add_argument("--dtype", default="auto")
    args = parser.parse_args()
    model, tokenizer = embedded_model(device="cpu", dtype=args.dtype)
    prompts = [prompt_ids(tokenizer, messages) for messages in conversations(starter_set(), args.prompts)]
    rows = []
    for _ in range(args.pairs):
        rows.append((tokens_per_second(model, tokenizer, [], prompts), theirs(model, tokenizer, prompts)))
    ours, other = zip(*rows, strict=True)
    print(json.dumps({
        "engine": median(ours), "continuous_batching": median(other), "ratio": median(a / b for a, b in rows),
    }, indent=2))  # fmt: skip


if __name__ == "__main__":
    main()
