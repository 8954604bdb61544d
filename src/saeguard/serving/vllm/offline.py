"""Guarded vLLM inside a program, without a server."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import ExitStack
from typing import TYPE_CHECKING, Any

from saeguard.errors import EngineError
from saeguard.serving.vllm.book import place, proof_id

if TYPE_CHECKING:
    from vllm import LLM


def guarded_llm(model: str, guardrails: Mapping[str, str], **options: Any) -> LLM:
    """A `vllm.LLM` that guards, proven; `guardrails` are folders by id, `options` those of `vllm.LLM`."""
    from vllm import LLM

    from saeguard.serving.vllm.engine import guard_every_engine

    guard_every_engine(guardrails)
    llm = LLM(model, **options)
    with ExitStack() as stack:
        stack.callback(close, llm)
        prove(llm)
        stack.pop_all()
    return llm


def close(llm: LLM) -> None:
    """End the engine."""
    llm.llm_engine.engine_core.shutdown()


def prove(llm: LLM) -> None:
    """Give the start-up proof, without which a guarded engine serves nothing. Raises `ProofError` where it fails."""
    from vllm import SamplingParams

    engine = llm.llm_engine
    for rule, texts in llm.collective_rpc("saeguard_proof_prompts")[0].items():
        for i, ids in enumerate(texts):
            engine.add_request(proof_id(rule, i), {"prompt_token_ids": ids}, SamplingParams(max_tokens=1))
    while engine.has_unfinished_requests():
        engine.step()
    llm.collective_rpc("saeguard_prove")


def verdicts(llm: LLM, request_id: str) -> list[list[dict[str, Any]]]:
    """For each sequence of a request, by `RequestOutput.request_id`, the verdict of every rule."""
    return merged(llm.collective_rpc("saeguard_verdicts", args=(request_id,)), request_id)


def merged(answers: list[dict[str, list[dict[str, Any]]]], request_id: str) -> list[list[dict[str, Any]]]:
    """The verdicts of a request from what each rank knows. Raises `EngineError` where ranks disagree."""
    sequences: dict[str, dict[str, dict[str, Any]]] = {}
    for answer in answers:
        for sequence, found in answer.items():
            known = sequences.setdefault(sequence, {})
            for verdict in found:
                if known.setdefault(verdict["rule"], verdict) != verdict:
                    raise EngineError(f"request {request_id}: two ranks decided differently: {known}, {verdict}")
    return [list(sequences[name].values()) for name in sorted(sequences, key=place)]
