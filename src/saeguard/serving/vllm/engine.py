"""How a guard gets into vLLM: its options are forced, its worker is replaced by `worker.GuardedWorker`.

vLLM makes every engine through `EngineArgs.create_engine_config`, in the process that starts it. That one method is
wrapped. The worker class and the guardrails travel inside the config to wherever the engine runs, so that a process
in which the plugin was not loaded still either guards or fails.

What is refused is what would let tokens go by unseen, or what nothing here was tested with.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from functools import wraps
from typing import Any

from vllm import __version__ as VLLM
from vllm.engine.arg_utils import EngineArgs
from vllm.platforms import current_platform

from saeguard.errors import EngineError

SUPPORTED = ("0.32",)
"""Series of vLLM whose insides are the ones known here."""
KEY = "saeguard"
"""Of the guardrails in `VllmConfig.additional_config`: {id: folder}."""
WORKER = "saeguard.serving.vllm.worker.GuardedWorker"
RUNNER = "VLLM_USE_V2_MODEL_RUNNER"
COMPILED = "SAEGUARD_COMPILED"
"""1: do not force `enforce_eager`; the guard is then one operator in vLLM's compiled model."""


def guard_every_engine(guardrails: Mapping[str, str]) -> None:
    """From now on, every engine that this process makes is guarded by these folders, or is not made."""
    check_version(VLLM)
    original: Any = getattr(EngineArgs.create_engine_config, "__wrapped__", EngineArgs.create_engine_config)

    @wraps(original)
    def create_engine_config(self: Any, *args: Any, **kwargs: Any) -> Any:
        force(self, guardrails)
        config = original(self, *args, **kwargs)
        check(config)
        return config

    EngineArgs.create_engine_config = create_engine_config


def check_version(version: str) -> None:
    """Raises `EngineError` for a vLLM whose insides are not known."""
    if ".".join(version.split(".")[:2]) not in SUPPORTED:
        raise EngineError.mismatch(
            "version of vLLM", found=version, expected=" or ".join(SUPPORTED),
            fix="Install that one, or a saeguard that knows yours.",
        )  # fmt: skip


def force(args: Any, guardrails: Mapping[str, str]) -> None:
    """Set the options of an `EngineArgs` that guarding needs. Raises `EngineError` where they are set otherwise."""
    if not (current_platform.is_cpu() or current_platform.is_cuda_alike()):
        raise EngineError(f"vLLM on {current_platform.device_name}: guarded are CPUs and GPUs of CUDA or ROCm")
    if os.environ.setdefault(RUNNER, "0") != "0":
        raise EngineError(f"{RUNNER}={os.environ[RUNNER]}: only the V1 model runner is guarded. Unset it.")
    if args.worker_cls not in ("auto", WORKER):
        raise EngineError(f"--worker-cls {args.worker_cls}: a guarded engine needs its own worker. Leave it out.")
    if args.enable_prefix_caching:
        raise EngineError("prefix caching hides tokens from the guard. Leave out --enable-prefix-caching.")
    args.worker_cls, args.enable_prefix_caching = WORKER, False
    args.enforce_eager = args.enforce_eager or os.environ.get(COMPILED, "0") != "1"
    args.additional_config = {**args.additional_config, KEY: dict(guardrails)}


def check(config: Any) -> None:
    """Raises `EngineError` for what an engine must not do when guarded."""
    model, parallel = config.model_config, config.parallel_config
    refused = {
        "the V2 model runner": config.use_v2_model_runner,
        "prefix caching": config.cache_config.enable_prefix_caching,
        "speculative decoding": config.speculative_config is not None,
        "KV transfer": config.kv_transfer_config is not None,
        "LoRA": config.lora_config is not None,
        "quantization": model.quantization is not None,
        "prompt embeddings": model.enable_prompt_embeds,
        "a multimodal model": model.is_multimodal_model,
        "a model that does not generate": model.runner_type != "generate",
        "a model revision (download it and give the folder)": model.revision is not None,
        "overrides of the model's config": bool(model.hf_overrides),
        "data parallelism (start one server a replica)": parallel.data_parallel_size > 1,
        "context parallelism": parallel.decode_context_parallel_size * parallel.prefill_context_parallel_size > 1,
        "dual batch overlap": parallel.use_ubatching,
    }
    if found := [name for name, is_on in refused.items() if is_on]:
        raise EngineError(f"a guarded vLLM does not do {', '.join(found)}. Switch that off; docs/vllm.md says why.")
