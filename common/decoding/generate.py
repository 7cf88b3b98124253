"""`python -m common.decoding.generate job.json`: completions of a file of prompts, by continuous batching.

Takes a `GenerateJob` whose model is a policy's artifact; appends one line of JSON per prompt to the job's
file, in the order of the prompts, each as soon as it and those before it are ready. Goes on after the last
whole line of a file that was begun with the same weights, prompts and settings, and refuses any other.
Sampling depends only on the seed, the prompt's index and the sample. Scores nothing. One process on one
device: a process of its own, since the controller imports no torch.
"""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from common.artifacts import LOADED_SUFFIXES, Artifact, content_sha256
from common.config import DataConfig, Dtype, ModelConfig, dtype_on
from common.data import cache
from common.data.dataset import build_whole
from common.data.dataset_types import DatasetType, Opened, prompts_with_room
from common.data.prompts import has_system
from common.data.stored import PromptDataset
from common.decoding.completions import CompletionsFile
from common.decoding.decoder import Decoder
from common.decoding.requests import Completion, Request, SamplingParams
from common.decoding.vllm_decoder import EngineSize, VLLMDecoder
from common.errors import UserError
from common.handoff import load_named
from common.inference_config import GenerateJob, ManySettings
from common.model.architecture import read_config
from common.model.loading import load_model
from common.model.tokenizer import load_tokenizer, terminators_of
from common.redact import shown
from common.runtime.distributed import init_world
from common.runtime.entry import job_main
from common.runtime.progress import Progress
from common.stage import Role
from common.vllm_fit import SamplingEngine

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase, PreTrainedTokenizerFast

STREAM = 0x67656E65
"""Tells the draws of completions from whatever else is derived from a seed."""

CHUNK_REQUESTS = 512
"""Completions that are queued at once. A file goes on at the beginning of such a chunk where what is decoded
side by side may show in the last bits, so that a chunk is computed as it was the first time."""

UNBOUNDED = 2**20
"""Tokens of a prompt with its completion where the model names no context."""

Say = Callable[[str], None]
Ready = Callable[[int, list[Completion]], None]


def say(line: str) -> None:
    """Print a line at once, in order with what the controller prints."""
    print(shown(line), flush=True)


def generate(job: GenerateJob) -> int:
    """Complete what is missing in `job.out`. Returns 0; UserError for what the user can fix."""
    settings = job.settings
    artifact = load_named(job.model, Role.policy, "MODEL")
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    model = ModelConfig(path=job.model, dtype=dtype_on(settings.dtype, gpu=device.type == "cuda"))
    tokenizer = load_tokenizer(model)
    kind = prompts_with_room(settings.max_new_tokens, job.system)
    rows = read_rows(job.data, artifact, tokenizer, kind, whole_context=job.whole_context, say=say)
    deciding = {key: value for key, value in dataclasses.asdict(settings).items() if key != "cuda_graphs"}
    made_with = {
        **deciding,
        "dtype": model.dtype.value, "device": device.type,
        "model": weights_of(artifact), "prompts": cache.rows_sha256(rows.folder),
        **({} if job.system is None else {"system": job.system}),
    }  # fmt: skip
    if job.system is not None and (own := sum(has_system(rows[number]) for number in range(len(rows)))):
        say(f"note: {own:,} of {len(rows):,} prompts have a system message of their own, and keep it")
    with CompletionsFile(Path(job.out), made_with) as file:
        done = file.count
        if done:
            say(f"{job.out} has {done:,} of {len(rows):,} prompts: going on")
        if done < len(rows):
            chunk = max(1, CHUNK_REQUESTS // settings.samples)

            def network() -> PreTrainedModel:
                return load_model(model, tokenizer, seed=0, device=device)

            with decoder_of(model, network, rows, settings, device) as decoder:
                can_be_exact = isinstance(decoder, Decoder) and decoder.has_cache
                is_exact = can_be_exact and device.type == "cpu" and model.dtype is Dtype.fp32
                begin = done if is_exact else done - done % chunk
                _complete(decoder, rows, range(begin, len(rows)), settings, chunk, tokenizer, file)
        say(f"{job.out}: {file.count:,} prompts, {file.summary()}")
    return 0


def _complete(
    decoder: Decoder | VLLMDecoder,
    rows: PromptDataset,
    prompt_ids: range,
    settings: ManySettings,
    chunk: int,
    tokenizer: PreTrainedTokenizerFast,
    file: CompletionsFile,
) -> None:
    """Append the completions of these prompts, but for those that the file has."""
    waiting: dict[int, list[Completion]] = {}
    with Progress(len(rows), label="generate", done=file.count) as progress:

        def ready(prompt_id: int, completions: list[Completion]) -> None:
            if prompt_id >= file.count:  # else of a chunk that is computed again
                waiting[prompt_id] = completions
            while (found := waiting.pop(file.count, None)) is not None:
                file.append(_line(rows, file.count, found, settings, tokenizer))
                progress.update(file.count)

        params = SamplingParams.of(settings, terminators_of(tokenizer))
        for first in range(prompt_ids.start, prompt_ids.stop, chunk):
            of_chunk = range(first, min(first + chunk, prompt_ids.stop))
            complete(decoder, rows, of_chunk, params, settings, ready)


def _line(
    rows: PromptDataset,
    prompt_id: int,
    completions: Sequence[Completion],
    settings: ManySettings,
    tokenizer: PreTrainedTokenizerBase,
) -> dict[str, Any]:
    prompt = rows[prompt_id]
    said = [
        {
            "text": text_of(completion, tokenizer),
            "stopped": completion.stopped,
            "tokens": len(completion.tokens),
            "logprob": float(completion.logprobs.sum(dtype=np.float64)),
        }
        for completion in completions
    ]
    others = {"columns": prompt.columns} if prompt.columns else {}
    return {
        "index": prompt_id, "row": rows.place(prompt_id), "seed": settings.seed, "prompt": prompt.prompt,
        "completions": said, **others,
    }  # fmt: skip


# --- What evaluating shares -------------------------------------------------------------------------


def read_rows(
    data: DataConfig,
    model: Artifact,
    tokenizer: PreTrainedTokenizerFast,
    kind: DatasetType[Opened],
    *,
    whole_context: bool,
    say: Say,
) -> Opened:
    """All rows of `data`, as the model reads them; says what became of them.

    Variables of the chat template are those that the model was trained with, unless `data` names some.
    UserError where none is left.
    """
    data = as_trained(data, model, whole_context=whole_context)
    if kind.room >= data.max_length:
        raise UserError(
            f"--max-new-tokens {kind.room} leaves no room for a prompt in {data.max_length} tokens",
            hint="fewer new tokens" + ("" if whole_context else ", or a larger data.max_length"),
        )
    rows, ledger = build_whole(data, tokenizer, kind, cache_dir=str(data.cache_dir), report=say)
    say("\n".join(ledger.lines()))
    return rows


def as_trained(data: DataConfig, model: Artifact, *, whole_context: bool) -> DataConfig:
    """`data` with the template's variables of the model's training, and its context if that is asked for."""
    kwargs = data.chat_template_kwargs or model.template_variables
    if not whole_context:
        return dataclasses.replace(data, chat_template_kwargs=kwargs)
    config: Any = read_config(ModelConfig(path=str(model.path))).get_text_config(decoder=True)
    context = getattr(config, "max_position_embeddings", None) or UNBOUNDED
    return dataclasses.replace(data, chat_template_kwargs=kwargs, max_length=context)


@contextmanager
def decoder_of(
    model: ModelConfig,
    network: Callable[[], PreTrainedModel],
    rows: PromptDataset,
    settings: ManySettings,
    device: torch.device,
) -> Iterator[Decoder | VLLMDecoder]:
    """What the settings say samples, with the weights of the model's files, while the block runs.

    network: the same weights for the builtin decoder. rows: their longest decides the size of vLLM's cache.
    """
    if settings.engine is SamplingEngine.builtin:
        yield Decoder(network(), slots=settings.slots, cuda_graphs=settings.cuda_graphs)
        return
    init_world()
    size = EngineSize(settings.slots, int(rows.lengths.max()) + settings.max_new_tokens)
    filters = settings.top_p < 1 or settings.top_k > 0
    decoder = VLLMDecoder(model, size, device, filters=filters, live=False)
    try:
        yield decoder
    finally:
        decoder.close()


def complete(
    decoder: Decoder | VLLMDecoder,
    rows: PromptDataset,
    prompt_ids: Sequence[int],
    params: SamplingParams,
    settings: ManySettings,
    ready: Ready,
) -> None:
    """Sample for each of these prompts; `ready` is given its number and its completions when all are done."""
    count = settings.samples
    keys = [(prompt_id, sample) for prompt_id in prompt_ids for sample in range(count)]
    tokens = {prompt_id: rows[prompt_id].input_ids for prompt_id in prompt_ids}
    requests = [
        Request(tokens[prompt_id], (settings.seed, STREAM, prompt_id, sample)) for prompt_id, sample in keys
    ]
    found: dict[int, dict[int, Completion]] = {prompt_id: {} for prompt_id in prompt_ids}

    def note(request: int, completion: Completion) -> None:
        prompt_id, sample = keys[request]
        found[prompt_id][sample] = completion
        if len(found[prompt_id]) == count:
            of_prompt = found.pop(prompt_id)
            ready(prompt_id, [of_prompt[number] for number in range(count)])

    decoder.decode(requests, params, ready=note)


def text_of(completion: Completion, tokenizer: PreTrainedTokenizerBase) -> str:
    """What it says, without its terminator."""
    tokens = completion.tokens[:-1] if completion.stopped else completion.tokens
    return str(tokenizer.decode(tokens.tolist(), skip_special_tokens=True))


def weights_of(artifact: Artifact) -> str:
    """Hash of all that a loader reads of an artifact: the same for the same model, wherever it lies."""
    files = artifact.manifest.files.items()
    return content_sha256({name: file["sha256"] for name, file in files if name.endswith(LOADED_SUFFIXES)})


if __name__ == "__main__":
    sys.exit(job_main(GenerateJob, generate))
