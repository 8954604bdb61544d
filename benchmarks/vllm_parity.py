"""The same prompts through Hugging Face and through vLLM: the same verdicts, and the same tokens?

    python benchmarks/vllm_parity.py --guardrail guardrails/astronomy [--dtype bfloat16]

Starter questions of the topic, its neighbours and other domains, and prompts in which topic and other text mix, in
the chat template; greedy answers. vLLM runs one prompt at a time, and 16 at once with prompts cut into chunks of at
most 48 tokens a step. Each sequence that vLLM wrote is then judged by the guard on the Hugging Face model.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
from typing import Any

import torch

from saeguard.embedded import TOPIC, StarterSet, embedded_model, model_folder, starter_set
from saeguard.evaluation.mcq import Question
from saeguard.generate import prompt_ids
from saeguard.guardrail import Guardrail

EACH = 10
NEAR_THRESHOLD = 0.05
"""Statistics this close to the threshold, relative to it, may fall on either side in bfloat16."""
MODES = {
    "one by one": {"max_num_seqs": 1},
    "16 at once, chunks": {"max_num_seqs": 16, "max_num_batched_tokens": 48},
}
ENVIRONMENT = {"VLLM_CPU_KVCACHE_SPACE": "1", "HF_HUB_OFFLINE": "1"}


def prompts(each: int) -> dict[str, list[str]]:
    """Prompts by kind."""
    questions = starter_set().questions
    kinds: dict[str, list[Question]] = {}
    for name, some in questions.items():
        kinds.setdefault(StarterSet.role(name), []).extend(some[: each if name == TOPIC else each // 2])
    plain = {kind: [question.text for question in some[:each]] for kind, some in kinds.items()}
    topic, other = plain["topic"], plain["far"]
    ends = [f"{a} {b}" if i % 2 else f"{b} {a}" for i, (a, b) in enumerate(zip(topic, other, strict=True))]
    return {**plain, "mixed": [f"{a} {b}" for a, b in zip(other[::-1], ends, strict=True)]}


def hugging_face(model: Any, rows: list[list[int]], new: int) -> list[list[int]]:
    """Greedy answers, unguarded."""
    answers = []
    for row in rows:
        ids = torch.tensor([row])
        with torch.inference_mode():
            out = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=new, do_sample=False)
        answers.append(out[0, len(row) :].tolist())
    return answers


def vllm(engine: Any, rows: list[list[int]], new: int, *, together: bool) -> list[Any]:
    """Greedy answers, as vLLM gives them."""
    from vllm import SamplingParams

    sampling = SamplingParams(temperature=0, max_tokens=new)
    inputs = [{"prompt_token_ids": row} for row in rows]
    if together:
        return list(engine.generate(inputs, sampling, use_tqdm=False))
    return [engine.generate([one], sampling, use_tqdm=False)[0] for one in inputs]


def compare(guard: Any, rows: list[list[int]], outputs: list[Any], found: list[list[dict[str, Any]]]) -> dict[str, Any]:
    """Verdicts of vLLM against those of the guard on the Hugging Face model, on the sequences that vLLM read."""
    different, near, gap, triggered, while_answering = [], 0, 0.0, 0, 0
    for i, (row, output, mine) in enumerate(zip(rows, outputs, found, strict=True)):
        read = row + list(output.outputs[0].token_ids)[:-1]
        theirs = guard.judge(torch.tensor([read]))[0]
        verdict = mine[0]
        gap = max(gap, abs(verdict["statistic"] - theirs.statistic))
        triggered += theirs.triggered
        while_answering += theirs.first_token is not None and theirs.first_token >= len(row)
        if (verdict["triggered"], verdict["first_token"]) != (theirs.triggered, theirs.first_token):
            different.append(i)
            near += abs(theirs.statistic - theirs.threshold) <= NEAR_THRESHOLD * theirs.threshold
    return {
        "verdicts": len(rows), "triggered": triggered, "triggered_while_answering": while_answering,
        "different": different, "of_those_near_threshold": near, "largest_gap_of_statistics": gap,
    }  # fmt: skip


def both_engines(args: argparse.Namespace) -> dict[str, Any]:
    """All modes, unguarded and guarded."""
    from vllm import LLM

    from saeguard.serving.vllm.offline import guarded_llm, verdicts

    model, tokenizer = embedded_model(dtype=args.dtype, device="cpu")
    guardrail, folder = Guardrail.from_pretrained(args.guardrail), str(model_folder())
    rows = [prompt_ids(tokenizer, text) for some in prompts(args.each).values() for text in some]
    plain = hugging_face(model, rows, args.new)
    with guardrail.attach(model, tokenizer):
        guarded = hugging_face(model, rows, args.new)
    options = {"dtype": args.dtype, "max_model_len": 1024, "enforce_eager": True, "enable_prefix_caching": False}
    results: dict[str, Any] = {"dtype": args.dtype, "prompts": len(rows)}
    agree: dict[str, list[int]] = {}
    for name, mode in MODES.items():
        tokens = answers(vllm(LLM(folder, **options, **mode), rows, args.new, together="16" in name))
        agree[name] = [i for i, (mine, theirs) in enumerate(zip(tokens, plain, strict=True)) if mine == theirs]
    for name, mode in MODES.items():
        engine = guarded_llm(folder, {"topic": args.guardrail}, **options, **mode)
        outputs = vllm(engine, rows, args.new, together="16" in name)
        tokens, found = answers(outputs), [verdicts(engine, output.request_id)[0] for output in outputs]
        with guardrail.attach(model, tokenizer) as guard:
            results[name] = compare(guard, rows, outputs, found)
        results[name] |= {
            "same_answers_unguarded": len(agree[name]),
            "of_those_same_guarded": sum(tokens[i] == guarded[i] for i in agree[name]),
        }
    return results


def answers(outputs: list[Any]) -> list[list[int]]:
    """The tokens that vLLM wrote."""
    gc.collect()  # the engine that wrote them is done, its memory is needed
    return [list(output.outputs[0].token_ids) for output in outputs]


def main() -> None:
    """Run all modes and print what differs."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--guardrail", required=True)
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--new", type=int, default=24)
    parser.add_argument("--each", type=int, default=EACH)
    args = parser.parse_args()
    os.environ |= ENVIRONMENT
    print(json.dumps(both_engines(args), indent=1))


if __name__ == "__main__":
    main()
