"""Sample responses with vLLM, in this process and on this device, behind the calls of `Decoder`.

Takes the folder of the policy's model, and where it is trained the live weights before every use, with
adapters these alone; returns completions as `Decoder` does. Every rank has an engine of its own for its
share of the requests: no forward pass is a collective. A token's draw depends on the request's key, on the
weights and, within rounding, on what is computed beside it. Log-probabilities are vLLM's own. On a GPU its
memory is given back between two uses of live weights (sleep mode); on the CPU it stays. Knows nothing of
text, rewards or training. The only file that imports vllm.
"""

from __future__ import annotations

import contextlib
import gc
import logging
import os
import random
import tempfile
import warnings
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

from common.config import Dtype, ModelConfig
from common.decoding.decoder import STEPS_BETWEEN_QUESTIONS
from common.decoding.requests import Completion, DecodingCounts, Request, SamplingParams
from common.decoding.scheduler import not_finite, rounded_up, token_limit
from common.errors import UserError
from common.model.adapters import ADAPTER
from common.model.architecture import read_config
from common.vllm_fit import BUILTIN, WAY_OUT, check_vllm

BLOCK = 128
"""Tokens of the largest page of vLLM's cache: on the CPU 128, on GPUs fewer."""
EXPERTS = ("num_experts", "num_local_experts", "n_routed_experts")
"""How configs of transformers say that there are some."""
LORA_RANKS = (8, 16, 32, 64, 128, 256, 320, 512)
"""What vLLM makes room for."""
RELOADING = "vllm.model_executor.model_loader.reload.inplace"
"""Logs as a warning what it does not take of the weights that it is given."""
SETTINGS = {
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",  # else weights would have to travel to another process
    "VLLM_NO_USAGE_STATS": "1",  # nothing is sent to anyone
    "VLLM_LOGGING_LEVEL": "ERROR",
    "RANK": "0",
    "LOCAL_RANK": "0",
}
"""What its environment must say before it is imported, unless it says something else."""


@dataclass(frozen=True)
class EngineSize:
    """slots: responses side by side. max_length: tokens of a prompt with its response. cache_bytes: of keys
    and values; None for room for all slots at that length."""

    slots: int
    max_length: int
    cache_bytes: float | None = None


class VLLMDecoder:
    """vLLM's engine in this process; all ranks make it together."""

    def __init__(
        self,
        model: ModelConfig,
        size: EngineSize,
        device: torch.device,
        *,
        filters: bool = False,
        adapter: Any = None,
        live: bool = True,
    ) -> None:
        """model: with a `path` and a dtype. filters: top_p or top_k leave out tokens, at temperature 1.
        adapter: peft's config of the adapter that is trained; None where the weights themselves are. live:
        weights are handed over by `holding`; else they are those of the files, and `decode` needs no block.

        UserError where vLLM is not there, does not know the model or the adapter, or refuses it.
        """
        check_vllm()
        self.counts = DecodingCounts(0, 0, 0)
        on_gpu, self._adapter, self._swapped_in = device.type == "cuda", adapter, None
        self._sleeps = on_gpu and live
        with _process_left_alone():
            self._vllm = _import_vllm()
            arguments, self._context = _arguments(self._vllm, model, size, on_gpu, filters, adapter, live)
            self._engine = _engine(self._vllm, arguments)
            # at its end it would destroy all process groups, which are the run's
            self._engine.engine_core._finalizer.detach()
        self._try_out()
        self._sleep()

    @contextmanager
    def holding(self, weights: Iterable[tuple[str, torch.Tensor]]) -> Iterator[None]:
        """The engine has these weights while the block runs, and its memory.

        weights: whole, under the names that the model's files have: all of them, or all of the adapter's.
        UserError for those that it does not take.
        """
        with _process_left_alone():
            self._wake()
            try:
                self._take(weights) if self._adapter is None else self._swap_in(weights)
            except (ValueError, KeyError) as error:
                words = " ".join(str(error).split())
                raise UserError(f"vLLM does not take the policy's weights: {words}", hint=BUILTIN) from error
        try:
            yield
        finally:
            self._sleep()

    def _take(self, weights: Iterable[tuple[str, torch.Tensor]]) -> None:
        with _complaints(RELOADING) as said:
            self._engine.collective_rpc("reload_weights", kwargs={"weights_iterator": weights})
        if said:
            raise ValueError(said[0])
        self._engine.collective_rpc(_pack_shared_weights)

    def _swap_in(self, weights: Iterable[tuple[str, torch.Tensor]]) -> None:
        """vLLM reads adapters from files, in peft's layout."""
        from safetensors.torch import save_file

        request = partial(self._vllm.lora.request.LoRARequest, "policy", 1)
        with tempfile.TemporaryDirectory(prefix="rlhf_adapter_") as folder:
            self._adapter.save_pretrained(folder)
            tensors = {name.replace(f".{ADAPTER}.", "."): weight.contiguous() for name, weight in weights}
            save_file(tensors, Path(folder, "adapter_model.safetensors"))
            self._engine.add_lora(request(folder, load_inplace=True))
            self._swapped_in = request(folder)  # is known by its number: nothing is read again

    def decode(
        self,
        requests: Sequence[Request],
        params: SamplingParams,
        *,
        should_stop: Callable[[], bool] | None = None,
        ready: Callable[[int, Completion], None] | None = None,
        lockstep: bool = False,
    ) -> list[Completion] | None:
        """As `Decoder.decode`; with live weights inside of `holding`. lockstep: nothing changes, no pass is a
        collective."""
        with _process_left_alone():
            self._engine.reset_prefix_cache()  # of other weights, or beside other requests
            self._ask(requests, params)
            found: dict[int, Completion] = {}
            steps = 0
            while self._engine.has_unfinished_requests():
                if should_stop is not None and steps % STEPS_BETWEEN_QUESTIONS == 0 and should_stop():
                    self._engine.abort_request([str(number) for number in range(len(requests))])
                    return None
                for output in self._engine.step():
                    number, completion = int(output.request_id), _completion(output)
                    found[number] = completion
                    if ready is not None:
                        ready(number, completion)
                steps += 1
        tokens = sum(len(completion.tokens) for completion in found.values())
        self.counts = DecodingCounts(steps, tokens, tokens)
        return [found[number] for number in range(len(requests))]

    def close(self) -> None:
        """Let go of the engine and of its memory; nothing can be asked any more."""
        with _process_left_alone():
            del self._engine
            gc.unfreeze()  # vLLM took all that was there from the collector's sight, itself too
            gc.collect()
            if torch.cuda.is_available():
                torch.cuda.empty_cache()

    def _ask(self, requests: Sequence[Request], params: SamplingParams) -> None:
        limits = [token_limit(request, params, self._context) for request in requests]
        for number, (request, limit) in enumerate(zip(requests, limits, strict=True)):
            sampling = self._vllm.SamplingParams(
                **sampling_fields(request, params, limit),
                flat_logprobs=True,
                output_kind=self._vllm.sampling_params.RequestOutputKind.FINAL_ONLY,
            )
            prompt = {"prompt_token_ids": request.prompt.tolist()}
            self._engine.add_request(str(number), prompt, sampling, lora_request=self._swapped_in)

    def _try_out(self) -> None:
        """UserError where the engine was made, and cannot compute: an attention head it has no kernel for."""
        try:
            self.decode([Request(np.zeros(1, np.int32), ())], SamplingParams(0.0, 1, ()))
        except RuntimeError as error:
            words = " ".join(str(error).split())
            raise UserError(
                f"vLLM cannot sample from the policy on this device: {words}", hint=BUILTIN
            ) from error

    def _wake(self) -> None:
        if self._sleeps:
            torch.cuda.empty_cache()  # vLLM asks the driver: what torch holds in reserve is not free to it
            self._engine.wake_up()

    def _sleep(self) -> None:
        """Give back the memory. Level 2 forgets the weights: others come before the next use. Under an
        adapter they are kept in host memory, level 1."""
        if self._sleeps:
            self._engine.sleep(level=2 if self._adapter is None else 1)


def sampling_fields(request: Request, params: SamplingParams, limit: int) -> dict[str, Any]:
    """Of vLLM's sampling parameters those that are not as they are by default. limit: tokens, at most."""
    return {
        "temperature": params.temperature,
        "top_p": params.top_p,
        "top_k": params.top_k,
        "max_tokens": limit,
        "seed": None if params.temperature == 0 else seed_of(request.key),
        "stop_token_ids": list(params.terminators),
        "ignore_eos": True,  # the terminators are those of the chat template, and no others
        "logprobs": 0,
        "detokenize": False,
    }


def seed_of(key: tuple[int, ...]) -> int:
    """A request's seed, 63 bits: vLLM seeds a generator per request with it."""
    return int(np.random.SeedSequence(key).generate_state(1, np.uint64)[0] >> np.uint64(1))


def cache_bytes(config: Any, size: EngineSize, width: int) -> int:
    """Bytes of keys and values. config: the model's; width: bytes of one number.

    2 L G d per token, for every slot to its longest response in whole pages, and one page that vLLM keeps.
    """
    if size.cache_bytes is not None:
        return int(size.cache_bytes)
    heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
    head_width = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    tokens = size.slots * rounded_up(size.max_length, BLOCK) + BLOCK
    return int(2 * config.num_hidden_layers * heads * head_width * width * tokens)


def _import_vllm() -> Any:
    """vllm; UserError where it does not load, as with another torch than it was built for."""
    for name, value in SETTINGS.items():
        os.environ.setdefault(name, value)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            import vllm
            import vllm.lora.request
            import vllm.sampling_params
            import vllm.v1.engine.llm_engine
    except (ImportError, OSError, AttributeError) as error:
        words = " ".join(str(error).split())
        raise UserError(f"vLLM is installed and cannot be imported: {words}", hint=WAY_OUT) from error
    return vllm


def _arguments(
    vllm: Any,
    model: ModelConfig,
    size: EngineSize,
    on_gpu: bool,
    filters: bool,
    adapter: Any,
    live: bool,
) -> tuple[Any, int]:
    """Of the engine, and the tokens that a prompt with its response may have."""
    config, context = read_config(model).get_text_config(decoder=True), context_of(model, size.max_length)
    width = 4 if model.dtype is Dtype.fp32 else 2
    return vllm.EngineArgs(
        model=str(model.path),
        # what the weights that it is given do not reach stays random, and shows in the first roll-out
        load_format="dummy" if live and adapter is None else "auto",
        dtype=dtype_name(model),
        trust_remote_code=model.trust_remote_code,
        max_model_len=context,
        max_num_seqs=size.slots,
        kv_cache_memory_bytes=cache_bytes(config, size, width),
        gpu_memory_utilization=0.05,  # not what it takes: so much must be free when it starts
        enforce_eager=not on_gpu,
        enable_sleep_mode=on_gpu and live,
        enable_prefix_caching=True,  # the samples of a group
        distributed_executor_backend="external_launcher",  # the ranks exist: one engine in each
        skip_tokenizer_init=True,
        generation_config="vllm",  # what is sampled is what is asked for
        logprobs_mode=logprobs_mode(filters),
        seed=0,
        disable_log_stats=True,
        use_tqdm_on_load=False,
        **({} if adapter is None else _for_adapter(adapter)),
    ), context


def context_of(model: ModelConfig, max_length: int) -> int:
    """Tokens that a prompt with its response may have. UserError for a model that vLLM would compute
    otherwise."""
    config = read_config(model).get_text_config(decoder=True)
    if any(getattr(config, name, 0) for name in EXPERTS):
        raise UserError(
            f"model_type={config.model_type} has experts, which vLLM 0.32 keeps under other names and whose "
            "log-probabilities differ",
            hint=BUILTIN,
        )
    return min(max_length, getattr(config, "max_position_embeddings", None) or max_length)


def dtype_name(model: ModelConfig) -> str:
    return {Dtype.fp32: "float32", Dtype.bf16: "bfloat16", Dtype.fp16: "float16"}[model.dtype]


def logprobs_mode(filters: bool) -> str:
    """Of all tokens, at the temperature. What top_p and top_k leave of them has other probabilities."""
    return "raw_logprobs" if filters else "processed_logprobs"


def _for_adapter(adapter: Any) -> dict[str, Any]:
    """Arguments of an engine with one adapter. UserError for one that vLLM would compute otherwise."""
    uneven = adapter.rank_pattern or adapter.alpha_pattern or adapter.target_parameters
    if adapter.use_dora or uneven or adapter.r > LORA_RANKS[-1]:
        raise UserError(
            "vLLM has one rank for all layers of an adapter, at most "
            f"{LORA_RANKS[-1]}, and neither DoRA nor adapters of experts",
            hint="model.lora.dora=false, linear layers as model.lora.targets, a lower model.lora.r, "
            f"or {BUILTIN}",
        )
    rank = next(rank for rank in LORA_RANKS if rank >= adapter.r)
    return {"enable_lora": True, "max_loras": 1, "max_cpu_loras": 1, "max_lora_rank": rank}


def _engine(vllm: Any, arguments: Any) -> Any:
    """UserError where vLLM does not know the model, or refuses it."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return vllm.v1.engine.llm_engine.LLMEngine.from_engine_args(arguments)
    except (ValueError, NotImplementedError) as error:  # pydantic's are ValueErrors
        words = " ".join(str(error).split())
        raise UserError(f"vLLM refuses the policy: {words}", hint=BUILTIN) from error


def _completion(output: Any) -> Completion:
    """Of a finished request. UserError for log-probabilities that are not finite."""
    (made,) = output.outputs
    logprobs = np.array(made.logprobs.logprobs, np.float32)
    if not np.isfinite(logprobs).all():
        raise not_finite(len(output.prompt_token_ids) + len(made.token_ids))
    return Completion(np.array(made.token_ids, np.int32), logprobs, made.finish_reason == "stop")


def _pack_shared_weights(worker: Any) -> None:
    """Pack again what shares its weight with another module, as an output layer with the embeddings.

    vLLM computes on the CPU from packed copies. It packs a module anew whose weight it is given, and a shared
    weight is given to one of the modules only: the others went on with the old one (vLLM 0.32).
    """
    packed = [module for module in worker.model_runner.get_model().modules() if hasattr(module, "cpu_linear")]
    owners = Counter(module.weight.data_ptr() for module in packed if module.weight.numel())
    for module in packed:
        if module.weight.numel() and owners[module.weight.data_ptr()] > 1:
            module.quant_method.process_weights_after_loading(module)


@contextmanager
def _complaints(logger_name: str) -> Iterator[list[str]]:
    """The warnings that a logger is given while the block runs, whatever its level."""
    said: list[str] = []
    handler = logging.Handler(logging.WARNING)
    handler.emit = lambda record: said.append(record.getMessage())  # type: ignore[method-assign]
    logger = logging.getLogger(logger_name)
    level = logger.level
    logger.addHandler(handler)
    logger.setLevel(logging.WARNING)
    try:
        yield said
    finally:
        logger.removeHandler(handler)
        logger.setLevel(level)


@contextmanager
def _process_left_alone() -> Iterator[None]:
    """Generators and `torch.set_num_threads` afterwards as before: vLLM seeds and draws, and on the CPU it
    puts a function that does nothing in the place of torch's."""
    devices = [torch.cuda.current_device()] if torch.cuda.is_available() else []
    with torch.random.fork_rng(devices), contextlib.ExitStack() as after:
        after.callback(random.setstate, random.getstate())
        after.callback(np.random.set_state, np.random.get_state())
        after.callback(setattr, torch, "set_num_threads", torch.set_num_threads)
        yield
