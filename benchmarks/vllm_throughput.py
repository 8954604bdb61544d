"""Throughput of vLLM guarded against unguarded: two engines, asked in turn in changing order, the ratio of each pair.

    python benchmarks/vllm_throughput.py --guardrail guardrails/astronomy [--pairs 10] [--dtype bfloat16]

Starter questions of every kind, in the chat template, 64 tokens each, all at once. Half of them trigger.
"""

from __future__ import annotations

import argparse
import json
import os
import time
from statistics import median
from typing import Any

from saeguard.embedded import model_folder, starter_set
from saeguard.generate import prompt_ids
from saeguard.model import load_tokenizer

OPTIONS = {"max_model_len": 512, "enable_prefix_caching": False, "max_num_seqs": 16}
TOKENS = 64


def seconds(engine: Any, rows: list[list[int]]) -> float:
    """Time to answer all prompts."""
    from vllm import SamplingParams

    inputs = [{"prompt_token_ids": row} for row in rows]
    sampling = SamplingParams(temperature=0, max_tokens=TOKENS, ignore_eos=True)
    start = time.perf_counter()
    engine.generate(inputs, sampling, use_tqdm=False)
    return time.perf_counter() - start


def main() -> None:
    """Run the pairs and print medians."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--guardrail", required=True)
    parser.add_argument("--pairs", type=int, default=10)
    parser.add_argument("--prompts", type=int, default=32)
    parser.add_argument("--dtype", default="bfloat16")
    args = parser.parse_args()
    os.environ |= {"VLLM_CPU_KVCACHE_SPACE": "1", "HF_HUB_OFFLINE": "1"}
    from vllm import LLM

    from saeguard.serving.vllm.offline import guarded_llm

    questions = starter_set().questions
    others = [question for name, some in questions.items() if name != "astronomy" for question in some[:4]]
    half = args.prompts // 2
    tokenizer = load_tokenizer(model_folder())
    rows = [prompt_ids(tokenizer, q.text) for q in [*questions["astronomy"][:half], *others[:half]]]
    options = {**OPTIONS, "dtype": args.dtype, "enforce_eager": os.environ.get("SAEGUARD_COMPILED") != "1"}
    plain = LLM(str(model_folder()), **options)
    guarded = guarded_llm(str(model_folder()), {"topic": args.guardrail}, **options)
    for engine in (plain, guarded):
        seconds(engine, rows)
    pairs = []
    for i in range(args.pairs):
        order = (plain, guarded) if i % 2 else (guarded, plain)
        took = {engine is guarded: seconds(engine, rows) for engine in order}
        pairs.append((took[False], took[True]))
    ratios = [unguarded / guarded for unguarded, guarded in pairs]
    tokens = TOKENS * len(rows)
    print(json.dumps({
        "pairs": len(pairs), "prompts": len(rows), "tokens": tokens,
        "unguarded_tokens_per_s": tokens / median(a for a, _ in pairs),
        "guarded_tokens_per_s": tokens / median(b for _, b in pairs),
        "guarded_over_unguarded": median(ratios), "lowest": min(ratios), "highest": max(ratios),
    }))  # fmt: skip


if __name__ == "__main__":
    main()
