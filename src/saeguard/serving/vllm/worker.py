"""The worker of a guarded engine. The only module that reaches into vLLM's insides; `engine.SUPPORTED` says whose.

Of the V1 model runner it uses `get_model`, `_model_forward` (which runs the model once all inputs are in place),
`input_batch.req_ids`, `input_batch.num_computed_tokens_cpu` and `input_ids`. A decoder layer returns
`(hidden, residual)`, whose sum is the residual stream, or the stream itself.

Whatever goes wrong is raised, at load or in a step: that ends the engine, so nothing is served unguarded. With tensor
parallelism each rank holds the whole residual stream and decides alike; with pipeline parallelism only the rank that
has a guarded layer acts.
"""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from vllm.distributed import get_pp_group, get_tp_group
from vllm.model_executor.models.utils import PPMissingLayer
from vllm.platforms import current_platform

from saeguard.errors import EngineError
from saeguard.serving.vllm.book import Book, as_dict
from saeguard.serving.vllm.engine import KEY
from saeguard.serving.vllm.graph import GraphGuard
from saeguard.serving.vllm.guard import LayerGuard
from saeguard.serving.vllm.loading import check_model, load_guardrails

if TYPE_CHECKING or not current_platform.is_cpu():
    from vllm.v1.worker.gpu_worker import Worker
else:
    from vllm.v1.worker.cpu_worker import CPUWorker as Worker


class GuardedLayer(nn.Module):
    """A decoder layer and the guard of what it returns. An eager guard acts while `serving`; one in a graph always."""

    def __init__(self, layer: nn.Module, guard: LayerGuard) -> None:
        super().__init__()
        self.layer = layer
        self.guard = guard
        self.key = guard.key if isinstance(guard, GraphGuard) else None
        self.serving = False

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(super().__getattr__("layer"), name)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """What the layer returns. A clamped row has all of its stream in the first part, none in the second."""
        output = self.layer(*args, **kwargs)
        if self.key is None and not self.serving:
            return output
        stream, residual = stream_of(output)
        changed = self.guard.guard(stream) if self.key is None else torch.ops.saeguard.guard(stream, self.key)
        if changed is None:
            return output
        new, where = changed[0], changed[1][:, None]
        if residual is None:
            return torch.where(where, new, stream)
        return torch.where(where, new, output[0]), residual.masked_fill(where, 0.0)


def decoder_layers(model: nn.Module, count: int) -> nn.ModuleList:
    """The list of decoder layers of one of vLLM's models: of all lists of `count` modules, the outermost one."""
    lists = [(name.count("."), name, part) for name, part in model.named_modules() if isinstance(part, nn.ModuleList)]
    found = [one for one in lists if len(one[2]) == count]
    if not found:
        raise EngineError(f"{type(model).__name__} holds no list of {count} decoder layers")
    return min(found, key=lambda one: one[:2])[2]


def stream_of(output: Any) -> tuple[Tensor, Tensor | None]:
    """The residual stream (tokens, d_model) that a decoder layer returned, and the second part of its output if any."""
    if isinstance(output, Tensor):
        return output, None
    if isinstance(output, tuple) and len(output) == 2 and all(isinstance(part, Tensor) for part in output):
        return output[0] + output[1], output[1]
    raise EngineError(f"a decoder layer returned {type(output).__name__}, expected a tensor or (hidden, residual)")


class GuardedWorker(Worker):
    """vLLM's own worker, guarded."""

    def load_model(self, **options: Any) -> None:
        """Load, check that the guardrails fit, put a guard on each layer they name."""
        super().load_model(**options)
        config = self.vllm_config
        folders = config.additional_config.get(KEY)
        if not folders:
            raise EngineError("no guardrail was given. Start with saeguard-vllm, or set SAEGUARD_GUARDRAILS.")
        self.loaded = load_guardrails(folders, config.model_config.tokenizer)
        if get_tp_group().is_first_rank and get_pp_group().is_first_rank:
            check_model(self.loaded, config.model_config.model)
        slots = 2 * config.scheduler_config.max_num_seqs
        self.guarded_layers = self._guard_layers(slots)
        self.book = Book([layer.guard for layer in self.guarded_layers], slots=slots)
        forward = self.model_runner._model_forward

        def announced(*args: Any, **kwargs: Any) -> Any:
            self._announce()
            return forward(*args, **kwargs)

        self.model_runner._model_forward = announced

    def execute_model(self, scheduler_output: Any) -> Any:
        """One step of the engine: all that it runs goes through every guard."""
        self.book.finish(scheduler_output.finished_req_ids)
        self._scheduled = scheduler_output.num_scheduled_tokens
        self._serving(True)
        output = super().execute_model(scheduler_output)
        self._serving(False)
        self.book.end()
        return output

    def saeguard_proof_prompts(self) -> dict[str, list[list[int]]]:
        """For each rule the token ids of the texts that prove it."""
        return self.loaded.proof_prompts(self.vllm_config.model_config.max_model_len - 1)

    def saeguard_prove(self) -> None:
        """Take the start-up proof from the requests that were made for it. Raises `ProofError`."""
        self.book.prove({name: len(texts) for name, texts in self.saeguard_proof_prompts().items()})

    def saeguard_verdicts(self, request: str) -> dict[str, list[dict[str, Any]]]:
        """The verdicts on a client's request, by the engine's ids of its sequences."""
        return {name: [as_dict(v) for v in these] for name, these in self.book.verdicts(request).items()}

    def refuse_other_weights(self, *args: Any, **kwargs: Any) -> None:
        """In place of vLLM's ways to change weights under way. Raises `EngineError`."""
        raise EngineError("the weights of a guarded engine stay what they were when it was proven")

    reload_weights = start_weight_update = update_weights = add_lora = refuse_other_weights

    def _guard_layers(self, slots: int) -> list[GuardedLayer]:
        make: Any = partial(LayerGuard, slots=slots, device=self.model_runner.device)
        if not self.vllm_config.model_config.enforce_eager:
            tokens = self.vllm_config.scheduler_config.max_num_batched_tokens
            make = partial(GraphGuard, slots=slots, device=self.model_runner.device, tokens=tokens)
        count = self.vllm_config.model_config.hf_text_config.num_hidden_layers
        layers = decoder_layers(self.model_runner.get_model(), count)
        guarded: list[GuardedLayer] = []
        for index, rules in self.loaded.rules().items():
            if isinstance(layers[index], PPMissingLayer):
                continue
            guarded.append(GuardedLayer(layers[index], make(index, rules, self.loaded.special)))
            layers[index] = guarded[-1]
        return guarded

    def _announce(self) -> None:
        """Tell the guards whose tokens the model is about to read."""
        runner, row, requests = self.model_runner, 0, []
        for i, request in enumerate(runner.input_batch.req_ids):
            count = self._scheduled[request]
            requests.append((request, int(runner.input_batch.num_computed_tokens_cpu[i]), count))
            row += count
        if len(requests) != len(self._scheduled):
            raise EngineError.mismatch(
                "requests of a step", found=len(requests), expected=len(self._scheduled), fix="Report this."
            )
        self.book.begin(requests, runner.input_ids.gpu[:row].long())

    def _serving(self, serving: bool) -> None:
        for layer in self.guarded_layers:
            layer.serving = serving
