"""The entry point `vllm.endpoint_plugins`: proves the guard before the server listens, and serves verdicts.

    GET /v1/saeguard/verdicts/{request_id}     {"id", "sequences": [[verdict of each rule], ...]}

`request_id` is the `id` of an answer. It can be asked for while the answer is still being written, and until 10,000
other requests have finished. The path begins with /v1 so that vLLM's API keys hold for it.
"""

from __future__ import annotations

import asyncio
from typing import Any

from fastapi import FastAPI, HTTPException, Request

from saeguard.serving.vllm.book import proof_id
from saeguard.serving.vllm.offline import merged
from saeguard.serving.vllm.plugin import PLUGIN


class Verdicts:
    """vLLM's protocol for a plugin that adds routes."""

    name = PLUGIN
    required_tasks = ("generate",)

    def attach_router(self, app: FastAPI) -> None:
        """Add the route."""
        app.add_api_route("/v1/saeguard/verdicts/{request_id}", _verdicts, methods=["GET"])

    async def init_state(self, engine_client: Any, state: Any, args: Any) -> None:
        """Runs before the server listens. Raises where the proof fails, which ends the server."""
        state.saeguard_engine = engine_client
        prompts = (await engine_client.collective_rpc("saeguard_proof_prompts"))[0]
        texts = [(proof_id(rule, i), ids) for rule, these in prompts.items() for i, ids in enumerate(these)]
        await asyncio.gather(*(_read(engine_client, request, ids) for request, ids in texts))
        await engine_client.collective_rpc("saeguard_prove")


async def _read(engine_client: Any, request: str, ids: list[int]) -> None:
    from vllm import SamplingParams

    async for _ in engine_client.generate({"prompt_token_ids": ids}, SamplingParams(max_tokens=1), request):
        pass


async def _verdicts(request_id: str, request: Request) -> dict[str, Any]:
    answers = await request.app.state.saeguard_engine.collective_rpc("saeguard_verdicts", args=(request_id,))
    if not (sequences := merged(answers, request_id)):
        raise HTTPException(404, f"no request {request_id}, or it was long ago")
    return {"id": request_id, "sequences": sequences}
