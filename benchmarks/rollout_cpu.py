"""Responses sampled on the CPU: our decoder beside `generate` of transformers, in one process.

Both get the same weights (4M parameters at random, the shape of conf/model/llama_4m.yaml), the same prompts
in the same order and the same response lengths, imposed on both: on ours by each request's `max_new_tokens`,
on `generate` by a stopping criterion that ends every row at its length. `generate` is used as one uses it:
batches of as many prompts as ours has slots, in the order of the queue, padded on the left, sampling at
temperature 1 out of all tokens, done when the longest row is. It is also measured with its queue sorted by
length, which takes knowing the lengths before. Lengths: `uniform`, all the same; `long_tailed`, geometric up
to the longest that is allowed, most of them short; `one_prompt`, long-tailed, with 8 samples of each prompt.

CPU-seconds of this process, sides in turn, medians over the repeats. The responses themselves are not
compared here; tests/common/decoding/test_decoder.py does.
"""

from __future__ import annotations

import argparse
import os
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.measure import table, threads_environment, write_results

LONGEST = 256
MEAN_OF_TAILED = 48
PROMPT_LENGTHS = (16, 96)
SAMPLES = 8
WANTED = {"uniform": 1.2, "long_tailed": 3.0}
OURS, GENERATE, SORTED = "ours", "generate", "generate, sorted by length"
SEED = 7


@dataclass(frozen=True)
class Load:
    """What both sides are asked for: prompts (int32 [T]) and how many tokens each response has."""

    prompts: list[np.ndarray]
    lengths: list[int]

    @property
    def tokens(self) -> int:
        return sum(self.lengths)

    def sorted_by_length(self) -> Load:
        """The same work, those of a length together."""
        order = np.argsort(self.lengths, kind="stable")
        return Load([self.prompts[i] for i in order], [self.lengths[i] for i in order])


def main() -> int:
    """Measure, print the table, write `results/rollout_cpu.json` where asked to."""
    arguments = _parser().parse_args()

    os.environ.update(threads_environment(arguments.threads))  # before torch is imported
    model, vocab_size = make_model(arguments.dtype)
    results: dict[str, Any] = {}
    for kind in arguments.lengths:
        load = make_load(kind, arguments.responses, arguments.longest, vocab_size)
        results[kind] = compared(model, load, arguments.slots, arguments.repeats)
        print(f"{kind}: {load.tokens:,} tokens in {len(load.lengths)} responses\n{rendered(results[kind])}")
        if kind in WANTED:
            print(verdict(kind, results[kind]["ratios"][GENERATE]), flush=True)
    if arguments.out is not None:
        name = f"rollout_cpu_{arguments.dtype}"
        settings = {key: value for key, value in vars(arguments).items() if key != "out"}
        print(f"written: {write_results(name, {'settings': settings, **results}, to=arguments.out)}")
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.rollout_cpu")
    kinds = ("uniform", "long_tailed", "one_prompt")
    parser.add_argument("--lengths", nargs="+", choices=kinds, default=kinds)
    parser.add_argument("--responses", type=int, default=256)
    parser.add_argument("--slots", type=int, default=64)
    parser.add_argument("--longest", type=int, default=LONGEST)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--dtype", choices=("fp32", "bf16"), default="fp32")
    parser.add_argument("--out", type=Path, help="folder for the JSON; without it none is written")
    return parser


def make_model(dtype: str) -> tuple[Any, int]:
    """The model of conf/model/llama_4m.yaml with random weights, and its vocabulary's size."""
    import torch
    import yaml
    from transformers import AutoConfig, AutoModelForCausalLM

    from common.model import attention

    path = Path(__file__).resolve().parent.parent / "conf" / "model" / "llama_4m.yaml"
    settings = yaml.safe_load(path.read_text())
    vocab_size = settings["tokenizer"]["train_vocab_size"]
    config = AutoConfig.for_model(**settings["config"], vocab_size=vocab_size)
    attention.register()
    torch.manual_seed(SEED)
    return AutoModelForCausalLM.from_config(
        config,
        dtype=torch.float32 if dtype == "fp32" else torch.bfloat16,
        attn_implementation=attention.NAME,
    ).eval(), vocab_size


def make_load(kind: str, responses: int, longest: int, vocab_size: int) -> Load:
    """Prompts of random tokens and the lengths that `kind` means."""
    rng = np.random.default_rng(SEED)
    different = responses // SAMPLES if kind == "one_prompt" else responses
    prompts = [
        rng.integers(3, vocab_size, rng.integers(*PROMPT_LENGTHS)).astype(np.int32) for _ in range(different)
    ]
    if kind == "uniform":
        lengths = np.full(responses, longest // 2)
    else:
        lengths = np.minimum(rng.geometric(1 / MEAN_OF_TAILED, responses), longest)
    return Load([prompts[i * different // responses] for i in range(responses)], lengths.tolist())


def compared(model: Any, load: Load, slots: int, repeats: int) -> dict[str, Any]:
    """Tokens per CPU-second of all sides, in turn; medians and our ratios to the others."""
    by_length = load.sorted_by_length()
    sides: dict[str, Callable[[], dict[str, float]]] = {
        OURS: lambda: decoded(model, load, slots),
        GENERATE: lambda: generated(model, load, slots),
        SORTED: lambda: generated(model, by_length, slots),
    }
    runs: dict[str, list[dict[str, float]]] = {name: [] for name in sides}
    for _ in range(repeats):
        for name, side in sides.items():
            runs[name].append(timed(side, load.tokens))
    medians = {
        name: {key: statistics.median(run[key] for run in records) for key in records[0]}
        for name, records in runs.items()
    }
    ours = medians[OURS]["tokens_per_cpu_second"]
    ratios = {name: ours / of["tokens_per_cpu_second"] for name, of in medians.items() if name != OURS}
    return {"tokens": load.tokens, "runs": runs, "medians": medians, "ratios": ratios}


def timed(side: Callable[[], dict[str, float]], tokens: int) -> dict[str, float]:
    """What a side says of itself, with its times."""
    cpu, wall = time.process_time(), time.perf_counter()
    said = side()
    cpu, wall = time.process_time() - cpu, time.perf_counter() - wall
    rates = {"tokens_per_cpu_second": tokens / cpu, "tokens_per_second": tokens / wall}
    return {"cpu_seconds": cpu, "wall_seconds": wall, **rates, **said}


def decoded(model: Any, load: Load, slots: int, cuda_graphs: bool = True) -> dict[str, float]:
    """With our decoder, its check of the model included."""
    from common.decoding.decoder import Decoder
    from common.decoding.requests import Request, SamplingParams

    requests = [
        Request(prompt, (SEED, number), length)
        for number, (prompt, length) in enumerate(zip(load.prompts, load.lengths, strict=True))
    ]
    decoder = Decoder(model, slots=slots, cuda_graphs=cuda_graphs)
    completions = decoder.decode(requests, SamplingParams(1.0, max(load.lengths), ()))
    assert completions is not None
    assert [len(completion.tokens) for completion in completions] == load.lengths
    return {"steps": decoder.counts.steps, "slot_utilisation": decoder.counts.slot_utilisation}


def generated(model: Any, load: Load, slots: int) -> dict[str, float]:
    """With transformers' `generate`, a batch after the other."""
    import torch

    from common.model.attention import plain_attention

    steps = 0
    with torch.no_grad(), plain_attention(model):
        for begin in range(0, len(load.prompts), slots):
            part = slice(begin, begin + slots)
            steps += _generate_batch(model, load.prompts[part], load.lengths[part])
    return {"steps": steps, "slot_utilisation": load.tokens / (steps * slots)}


def _generate_batch(model: Any, prompts: list[np.ndarray], lengths: list[int]) -> int:
    """One batch, padded on the left; returns the number of its steps."""
    import torch

    widest = max(map(len, prompts))
    ids = torch.zeros(len(prompts), widest, dtype=torch.long)
    mask = torch.zeros_like(ids)
    for row, prompt in enumerate(prompts):
        ids[row, widest - len(prompt) :] = torch.from_numpy(prompt.astype(np.int64))
        mask[row, widest - len(prompt) :] = 1
    ends = torch.tensor(lengths) + widest

    def ended(so_far: torch.Tensor, scores: Any, **_: Any) -> torch.Tensor:
        return so_far.shape[1] >= ends

    output = model.generate(
        input_ids=ids,
        attention_mask=mask,
        do_sample=True,
        top_k=0,
        max_new_tokens=max(lengths),
        pad_token_id=0,
        eos_token_id=None,
        use_cache=True,
        stopping_criteria=[ended],
    )
    assert output.shape[1] == widest + max(lengths)
    return max(lengths)


def rendered(result: dict[str, Any]) -> str:
    """The medians as a table."""
    names = ["tokens_per_cpu_second", "cpu_seconds", "steps", "slot_utilisation"]
    rows = [[side, *(of[name] for name in names)] for side, of in result["medians"].items()]
    return table(["", *names], rows)


def verdict(kind: str, ratio: float) -> str:
    """Whether the bar is met, in a line."""
    wanted = WANTED[kind]
    met = "met" if ratio >= wanted else "not met"
    return f"{kind}: {ratio:.2f} x generate in tokens per CPU-second (wanted {wanted}): {met}"


if __name__ == "__main__":
    raise SystemExit(main())
