"""Sample responses from the live weights of a causal LM.

Takes a transformers model (also one wrapped by peft), prompts as token ids and sampling parameters; returns
token ids, their log-probabilities and whether each response stopped by itself. `slots` responses are decoded
together by continuous batching, each with its slot of the KV cache. The decoder knows nothing of text,
rewards or training.

A response depends only on the weights, the prompt and the request's key. Each token is the inverse of the
cumulative distribution at a uniform number of the request's own stream. On the CPU in fp32, logits do not
depend on the other slots: matrix products have at least `FEWEST_ROWS` rows (with fewer, other kernels with
other roundings are used), element-wise kernels have no scalar remainder (`CPU_ROWS`), and attention sums the
keys of every slot from its first. On other devices, kernels may round differently for other batch sizes; then
a draw within rounding of the boundary between two tokens may give the other token.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from torch import nn

from common.decoding.passes import CachedPasses, UncachedPasses, fault_of_cache, sampling_from
from common.decoding.requests import Completion, DecodingCounts, Request, SamplingParams
from common.decoding.scheduler import Passes, Scheduler
from common.errors import UserError
from common.model.adapters import unwrapped
from common.model.flash_attention import say_without_used_keys
from common.notices import notice
from common.runtime.distributed import all_reduce_sum

STEPS_BETWEEN_QUESTIONS = 16
"""Forward passes between two questions whether to stop."""


class Decoder:
    """The engine in this process. The model's weights may change between calls of `decode`, not during one.

    model: a causal LM with packed attention. slots: responses decoded side by side. An architecture that
    cannot decode from a cache of slots (found out here, with a few tokens) is decoded without a cache, which
    is slow and said in a notice. Under ZeRO-3 with partitioned parameters all ranks make it together.
    cuda_graphs: on a GPU, replay passes without prompts as CUDA graphs; a notice says where that fails.
    """

    def __init__(self, model: nn.Module, *, slots: int, cuda_graphs: bool = True) -> None:
        if slots < 1:
            raise ValueError(f"slots={slots}")
        self.model, self.slots = model, slots
        self.counts = DecodingCounts(0, 0, 0)
        fault = fault_of_cache(unwrapped(model))
        self.has_cache = fault is None
        if fault is not None:
            notice(
                "responses are sampled without a key/value cache",
                f"model_type={unwrapped(model).config.model_type} cannot decode from one: {fault}",
                "several times as slow, more so for longer ones",
            )
        parameter = next(model.parameters())
        say_without_used_keys(parameter.device, parameter.dtype)
        self._graphs = cuda_graphs and self.has_cache and parameter.is_cuda
        if self._graphs and any(hasattr(each, "ds_id") for each in model.parameters()):
            self._without_graphs("ZeRO-3 gathers its weights in every pass")

    def decode(
        self,
        requests: Sequence[Request],
        params: SamplingParams,
        *,
        should_stop: Callable[[], bool] | None = None,
        ready: Callable[[int, Completion], None] | None = None,
        lockstep: bool = False,
    ) -> list[Completion] | None:
        """Completions in the order of the requests; None as soon as `should_stop` was seen to be true.

        ready: is given each completion as it ends, with the number of its request.
        lockstep: forward passes are collectives, so every rank (with requests or without) makes as many as
        the one that needs most, and all leave when one is told to. Leaves the modes and the attention of the
        model and all generators as they were. UserError for a prompt that leaves the model's context no room,
        and when the logits are not finite.
        """
        config = unwrapped(self.model).config.get_text_config(decoder=True)
        scheduler = Scheduler(requests, params, self.slots, getattr(config, "max_position_embeddings", None))
        with sampling_from(self.model, self.has_cache) as base:
            passes = (
                CachedPasses(base, scheduler.slots, scheduler.capacity, graphs=self._graphs)
                if self.has_cache
                else UncachedPasses(base)
            )
            finished = _until_done(scheduler, passes, should_stop, ready, lockstep)
        self.counts = DecodingCounts(scheduler.steps, int(scheduler.made.sum()), scheduler.computed_rows)
        if isinstance(passes, CachedPasses) and passes.graphs is not None and passes.graphs.fault is not None:
            self._without_graphs(passes.graphs.fault)
        return scheduler.completions() if finished else None

    def _without_graphs(self, why: str) -> None:
        """From now on."""
        self._graphs = False
        what = f"model_type={unwrapped(self.model).config.model_type} allows none: {why}"
        notice("responses are sampled without CUDA graphs", what, "the GPU may wait for the host")


def _until_done(
    scheduler: Scheduler,
    passes: Passes,
    should_stop: Callable[[], bool] | None,
    ready: Callable[[int, Completion], None] | None,
    lockstep: bool,
) -> bool:
    """Forward passes until nothing is left to do; false when told to stop.

    lockstep: what goes wrong on one rank is raised when the others know, so that none waits for it in a pass.
    """
    failed: UserError | None = None
    while True:
        stop = should_stop is not None and scheduler.steps % STEPS_BETWEEN_QUESTIONS == 0 and should_stop()
        busy = scheduler.busy
        if lockstep:
            told, working = all_reduce_sum([stop or failed is not None, busy])
            stop, busy = told > 0, working > 0
        if failed is not None:
            raise failed
        if stop or not busy:
            return not stop
        try:
            ended = scheduler.step(passes)
        except UserError as error:
            if not lockstep:
                raise
            failed = error
            continue
        if ready is not None:
            for request in ended:
                ready(request, scheduler.completion(request))
