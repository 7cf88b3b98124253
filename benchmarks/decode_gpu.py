"""Responses sampled on one CUDA GPU by the builtin decoder: `python -m benchmarks.decode_gpu --shape 1b`.

Llama shapes with random weights in bf16, made on the device; prompts of random tokens. All responses have the
same length, so that every slot is busy to the end. Reports sampled tokens per second and peak GPU memory for
each number of slots, with CUDA graphs and without, beside what reading the weights once per token would allow
at the device's bandwidth.
Writes `results/decode_gpu_<shape>.json`. Runs on the CPU with `--shape toy`, to see that it works.
"""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.measure import table, write_results
from benchmarks.rollout_cpu import SEED, Load
from benchmarks.sft_gpu import SHAPES

# Llama 3.1 8B: 8.03 billion weights
LLAMA_8B: dict[str, Any] = {
    "vocab_size": 128_256, "hidden_size": 4096, "intermediate_size": 14_336, "num_hidden_layers": 32,
    "num_attention_heads": 32, "num_key_value_heads": 8, "tie_word_embeddings": False,
}  # fmt: skip
MODELS = {"toy": SHAPES["toy"].config, "1b": SHAPES["1b"].config, "8b": LLAMA_8B}
BANDWIDTH = {"H100": 3.35e12, "H200": 4.8e12, "A100": 2.0e12}
"""Bytes per second of a device's memory, by its data sheet."""


def main() -> int:
    """Measure, print the table, write the results."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.decode_gpu")
    parser.add_argument("--shape", choices=tuple(MODELS), required=True)
    parser.add_argument("--slots", type=int, nargs="+", default=[64, 256])
    parser.add_argument("--prompt", type=int, default=256, help="tokens of a prompt")
    parser.add_argument("--response", type=int, default=512, help="tokens of a response")
    parser.add_argument("--results", type=Path, help="folder of the JSON; by default benchmarks/results")
    arguments = parser.parse_args()
    import torch

    device = torch.device("cuda", 0) if torch.cuda.is_available() else torch.device("cpu")
    model = new_model(arguments.shape, device)
    runs = {}
    for slots in arguments.slots:
        for graphs in (False, True) if device.type == "cuda" else (False,):
            name = f"{slots}, graphs" if graphs else f"{slots}"
            runs[name] = decoded(model, load_of(arguments, slots), slots, graphs)
            print(f"{name}: {runs[name]['tokens_per_second']:,.0f} tokens/s", flush=True)
    head = ("slots", *next(iter(runs.values())))
    print(table(head, [(name, *record.values()) for name, record in runs.items()]))
    result = {"shape": arguments.shape, "prompt": arguments.prompt, "response": arguments.response}
    path = write_results(f"decode_gpu_{arguments.shape}", {**result, "runs": runs}, to=arguments.results)
    print(f"written: {path}")
    return 0


def new_model(shape: str, device: Any) -> Any:
    """Random weights, with the attention of training, as PPO samples."""
    import torch
    from transformers import AutoModelForCausalLM, LlamaConfig

    from common.model import attention

    attention.register()
    torch.manual_seed(SEED)
    config = LlamaConfig(**MODELS[shape], max_position_embeddings=8192)
    with device:
        model = AutoModelForCausalLM.from_config(
            config, dtype=torch.bfloat16, attn_implementation=attention.NAME
        )
    return model.eval()


def load_of(arguments: argparse.Namespace, slots: int) -> Load:
    """A prompt for every slot."""
    rng = np.random.default_rng(SEED)
    vocabulary = MODELS[arguments.shape]["vocab_size"]
    prompts = [rng.integers(3, vocabulary, arguments.prompt).astype(np.int32) for _ in range(slots)]
    return Load(prompts, [arguments.response] * slots)


def decoded(model: Any, load: Load, slots: int, cuda_graphs: bool) -> dict[str, float]:
    """One round to warm up, one that counts."""
    import torch

    from benchmarks.rollout_cpu import decoded as run

    gpu = next(model.parameters()).is_cuda
    run(model, Load(load.prompts, [8] * slots), slots, cuda_graphs)
    if gpu:
        torch.cuda.reset_peak_memory_stats()
        torch.cuda.synchronize()
    began = time.perf_counter()
    said = run(model, load, slots, cuda_graphs)
    if gpu:
        torch.cuda.synchronize()
    seconds = time.perf_counter() - began
    record = {"tokens_per_second": load.tokens / seconds, "seconds": seconds, **said}
    if gpu:
        record["peak_memory_gb"] = torch.cuda.max_memory_allocated() / 1e9
        record |= at_most(model, slots, torch.cuda.get_device_name())
    return record


def at_most(model: Any, slots: int, device_name: str) -> dict[str, float]:
    """Tokens per second if a pass did nothing but read the weights; empty for an unknown device."""
    for name, bandwidth in BANDWIDTH.items():
        if name in device_name:
            weights = sum(p.numel() * p.element_size() for p in model.parameters())
            return {"at_most": slots * bandwidth / weights}
    return {}


if __name__ == "__main__":
    sys.exit(main())
