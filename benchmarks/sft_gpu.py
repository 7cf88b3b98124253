"""SFT on one CUDA GPU, ours beside TRL's SFTTrainer: `python -m benchmarks.sft_gpu --shape 1b`.

Llama shapes with random weights, bf16 with fp32 optimizer state on both sides, the same packed synthetic
documents in the same steps; needs neither data nor a hub. Ours: the layout of Batches, PackedCausalLM (flash
attention by document, chunked cross-entropy) and Engine (ZeRO). TRL: packed rows without padding, flash
attention where a kernel is installed, else SDPA with one row per pass (its mask is quadratic in a pass's
tokens); it keeps fp32 weights under autocast, which is what it calls bf16. Reports tokens per second, MFU,
peak GPU memory and the largest difference of the losses; each side is a process of its own. Writes
`results/sft_gpu_<shape>_<length>.json`. Runs on the CPU with `--shape toy`, to see that it works.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import tempfile
import time
from contextlib import nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from benchmarks.measure import ChildFailed, run_measured, table, threads_environment, write_results
from benchmarks.profiled import profiled
from common.cores import count_cores
from launch import local

if TYPE_CHECKING:
    import torch

    from common.data.types import Batch, TokenizedExample

LEARNING_RATE = 1e-5
SKIPPED_STEPS = 3
TRAINED_SHARE = 2 / 3


@dataclass(frozen=True)
class Shape:
    """A model, and how much of it fits: tokens per pass, passes per optimizer step."""

    config: dict[str, Any]
    tokens_per_pass: int
    passes: int
    gradient_checkpointing: bool


SHAPES = {
    "toy": Shape(
        {
            "vocab_size": 512, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2,
            "num_attention_heads": 4, "num_key_value_heads": 2, "tie_word_embeddings": True,
        },
        tokens_per_pass=256, passes=2, gradient_checkpointing=False,
    ),
    # Llama 3.2 1B: 1.24 billion weights
    "1b": Shape(
        {
            "vocab_size": 128_256, "hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 16,
            "num_attention_heads": 32, "num_key_value_heads": 8, "tie_word_embeddings": True,
        },
        tokens_per_pass=16_384, passes=2, gradient_checkpointing=False,
    ),
    # Llama 2 7B: 6.74 billion weights
    "7b": Shape(
        {
            "vocab_size": 32_000, "hidden_size": 4096, "intermediate_size": 11_008, "num_hidden_layers": 32,
            "num_attention_heads": 32, "num_key_value_heads": 32, "tie_word_embeddings": False,
        },
        tokens_per_pass=8192, passes=2, gradient_checkpointing=True,
    ),
}  # fmt: skip


@dataclass(frozen=True)
class Run:
    """What one side is told, through a JSON file."""

    side: str  # ours or trl
    shape: str
    length: int
    steps: int
    zero_stage: int
    attention: str  # of TRL
    rows_per_pass: int
    passes: int
    out: str
    profile: bool = False

    @property
    def rows_per_step(self) -> int:
        """Packed rows of one optimizer step: the same on both sides."""
        return self.rows_per_pass * self.passes


def main() -> int:
    """Compare at every length asked for."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.sft_gpu")
    parser.add_argument("--shape", choices=tuple(SHAPES), required=True)
    parser.add_argument("--length", type=int, nargs="+", default=[2048, 8192], help="tokens per packed row")
    parser.add_argument("--steps", type=int, default=13)
    parser.add_argument("--zero-stage", type=int, default=1, choices=(1, 2, 3))
    parser.add_argument(
        "--trl-attention", nargs="+", help="measure each; by default the best that is installed"
    )
    parser.add_argument("--profile", action="store_true", help="ours alone: the kernels of its last step")
    parser.add_argument("--results", type=Path, help="folder of the JSON; by default benchmarks/results")
    parser.add_argument("--child", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.child is not None:
        run_side(Run(**json.loads(arguments.child.read_text())))
        return 0
    attentions = arguments.trl_attention or [installed_attention()]
    for length in arguments.length:
        with tempfile.TemporaryDirectory(prefix="sft_gpu_") as folder:
            runs = plan(
                arguments.shape, length, arguments.steps, arguments.zero_stage, attentions, Path(folder)
            )
            if arguments.profile:
                runs = {"ours": replace(runs["ours"], profile=True)}
            records = {name: measure(run) for name, run in runs.items()}
        result = {"shape": arguments.shape, "length": length, **summary(records)}
        for kernel in records["ours"].get("kernels", [])[:20]:
            print(f"{kernel['share']:6.1%}  {kernel['calls']:5}  {kernel['kernel'][:90]}")
        print(f"\n{arguments.shape}, rows of {length} tokens\n{rendered(records)}\n{verdict(result)}")
        path = write_results(f"sft_gpu_{arguments.shape}_{length}", result, to=arguments.results)
        print(f"written: {path}", flush=True)
    return 0


def installed_attention() -> str:
    """The fastest attention that TRL can use here."""
    from transformers.utils import is_flash_attn_2_available

    return "flash_attention_2" if is_flash_attn_2_available() else "sdpa"


def plan(
    shape: str, length: int, steps: int, zero_stage: int, attentions: list[str], folder: Path
) -> dict[str, Run]:
    """Ours, and TRL with each attention. Rows per step are equal; rows per pass are each side's best."""
    sizes = SHAPES[shape]
    rows, passes = max(1, sizes.tokens_per_pass // length), sizes.passes
    runs = {
        "ours": Run("ours", shape, length, steps, zero_stage, "packed", rows, passes, str(folder / "ours"))
    }
    for name in attentions:
        fits = (rows, passes) if name.startswith("flash") else (1, rows * passes)
        runs[f"TRL {name}"] = Run("trl", shape, length, steps, 0, name, *fits, str(folder / name))
    return runs


def measure(run: Run) -> dict[str, Any]:
    """One side in a process of its own; what went wrong, where it fails (out of memory, for one)."""
    out = Path(run.out)
    out.mkdir(parents=True)
    (out / "run.json").write_text(json.dumps(vars(run)))
    command = [
        sys.executable, "-m", "benchmarks.sft_gpu", "--shape", run.shape, "--child", str(out / "run.json"),
    ]  # fmt: skip
    threads = threads_environment(min(count_cores(), 8))
    environment = {**local.environment(local.Job("", ())), **threads}
    environment |= {
        "PYTORCH_ALLOC_CONF": "expandable_segments:True"
    }  # spares the last gigabytes, on both sides
    try:
        usage, _ = run_measured(command, log=out / "log", environment=environment)
    except ChildFailed as error:
        print(f"{run.side} {run.attention} failed:\n{error}", flush=True)
        return {"error": str(error)[-2000:], "run": vars(run)}
    record = json.loads((out / "record.json").read_text())
    if run.profile:
        record["kernels"] = json.loads((out / "kernels.json").read_text())
    print(f"{run.side} {run.attention}: {record['tokens_per_second']:,.0f} tokens/s", flush=True)
    return {**record, "wall_seconds": usage.wall_seconds, "run": vars(run)}


# documents, the same for both sides


def documents_of(run: Run, row: int) -> list[TokenizedExample]:
    """The documents that fill packed row `row`, a function of its number alone; labels aligned."""
    from common.data.types import IGNORE, TokenizedExample

    generator = np.random.default_rng([run.length, row])
    vocabulary = SHAPES[run.shape].config["vocab_size"]
    documents, room = [], run.length
    while room:
        size = min(room, int(generator.integers(run.length // 16, run.length // 2)))
        if room - size < 4:  # no document too short to have a prompt and an answer
            size = room
        # frequent and rare ids, so that there is something to learn
        ids = (vocabulary * generator.random(size) ** 3).astype(np.int32)
        labels = np.append(ids[1:], IGNORE).astype(np.int32)
        labels[: int(size * (1 - TRAINED_SHARE))] = IGNORE
        documents.append(TokenizedExample(ids, labels, "synthetic"))
        room -= size
    return documents


def batches_of(run: Run, step: int) -> list[Batch]:
    """Our micro-batches of a step."""
    from common.data.batches import collate

    batches = []
    for number in range(run.passes):
        first = step * run.rows_per_step + number * run.rows_per_pass
        documents = [doc for row in range(first, first + run.rows_per_pass) for doc in documents_of(run, row)]
        batches.append(collate(documents, range(len(documents)), [0] * len(documents)))
    return batches


def columns_of(run: Run) -> dict[str, list[list[int]]]:
    """All rows as TRL's packing would leave them; labels stand where their tokens do."""
    from common.data.types import IGNORE

    columns: dict[str, list[list[int]]] = {"input_ids": [], "labels": [], "seq_lengths": []}
    for row in range(run.steps * run.rows_per_step):
        documents = documents_of(run, row)
        columns["input_ids"].append(np.concatenate([d.input_ids for d in documents]).tolist())
        columns["labels"].append(np.concatenate([[IGNORE, *d.labels[:-1]] for d in documents]).tolist())
        columns["seq_lengths"].append([len(d.input_ids) for d in documents])
    return columns


# one side, in its own process


def run_side(run: Run) -> None:
    """Train, and write `record.json`."""
    import torch

    from common.runtime.performance import peak_flops, training_flops_per_token

    device = torch.device("cuda", 0) if torch.cuda.is_available() else torch.device("cpu")
    train = train_ours if run.side == "ours" else train_trl
    model, losses, ends = train(run, device)
    # a median, because one slow step (an allocation, another process) is not the speed
    seconds = statistics.median(np.diff(ends[SKIPPED_STEPS - 1 :]).tolist())
    rate = run.rows_per_step * run.length / seconds
    record: dict[str, Any] = {"losses": losses, "seconds_per_step": seconds, "tokens_per_second": rate}
    flops = training_flops_per_token(model)
    if device.type == "cuda":
        record["peak_memory_gb"] = torch.cuda.max_memory_allocated() / 1e9
        record["reserved_memory_gb"] = torch.cuda.max_memory_reserved() / 1e9
        if peak := peak_flops(torch.cuda.get_device_name(), "bf16"):
            record["mfu"] = flops * rate / peak
        record["planned_memory_gb"] = planned(run)
    record["parameters"] = sum(p.numel() for p in model.parameters())
    Path(run.out, "record.json").write_text(json.dumps(record))


def new_model(run: Run, device: torch.device, attention: str) -> Any:
    """The same bf16 weights for both sides, made on the device."""
    import torch
    from transformers import AutoModelForCausalLM, LlamaConfig

    config = LlamaConfig(**SHAPES[run.shape].config, max_position_embeddings=max(run.length, 2048))
    torch.manual_seed(0)
    with device:
        model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16, attn_implementation=attention)
    return model.train()


def planned(run: Run) -> float:
    """GB that `plan` would say for our side."""
    from pipeline.planning.memory import estimate
    from pipeline.planning.network import from_fields
    from pipeline.planning.work import Head, MicroBatchShape, Sharding, Trained, Workload

    network = from_fields(SHAPES[run.shape].config)
    assert network is not None
    tokens = run.rows_per_pass * run.length
    batch = MicroBatchShape(tokens, int(tokens * TRAINED_SHARE), short=False)
    work = Workload(
        networks=(Trained(network, network.parameters, Head.tokens),), batch=batch,
        sharding=Sharding(max(run.zero_stage, 1), 1), half=True, gpu=True,
        checkpointing=SHAPES[run.shape].gradient_checkpointing,
    )  # fmt: skip
    return estimate(work).device / 1e9


def _now(device: torch.device) -> float:
    """Seconds, once the device has done what it was told."""
    import torch

    if device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter()


def train_ours(run: Run, device: torch.device) -> tuple[Any, list[float], list[float]]:
    """(model, loss of each step, when each step ended), with the pipeline's own classes."""
    from common.config import DeepSpeedConfig, Dtype
    from common.model import attention
    from common.model.packed import PackedCausalLM
    from common.model.probes import find_shortcuts, isolate_documents
    from common.model.recomputation import enable_checkpointing
    from common.runtime.distributed import close_world, init_world
    from common.training.ds_config import build_ds_config
    from common.training.engine import Engine
    from common.training.optim import build_optimizer
    from common.training_config import OptimConfig
    from step1_sft.data import count_tokens
    from step1_sft.loss import TokenSums, compute_loss

    world = init_world()
    attention.register()
    model = new_model(run, device, attention.NAME)
    isolate_documents(model)
    if SHAPES[run.shape].gradient_checkpointing:
        enable_checkpointing(model)  # as load_model does, whose weights come from the CPU
    module = PackedCausalLM(model, find_shortcuts(model))
    optimizer = build_optimizer(module, OptimConfig(), LEARNING_RATE)
    config = build_ds_config(
        DeepSpeedConfig(stage=run.zero_stage), dtype=Dtype.bf16, max_grad_norm=1.0,
        micro_batch_size=run.rows_per_pass, world_size=world.size, num_parameters=model.num_parameters(),
        gpu=device.type == "cuda",
    )  # fmt: skip
    engine = Engine(module, optimizer, config)
    engine.train()
    losses, ends = [], []
    for step in range(run.steps):
        batches = batches_of(run, step)
        _, trained, _ = count_tokens(batches)
        sums = TokenSums()
        profiling = run.profile and step == run.steps - 1
        with profiled(Path(run.out, "kernels.json"), device) if profiling else nullcontext():
            for batch in batches:
                result = compute_loss(engine, batch, device, with_entropy=True)
                engine.backward(result.loss_sum, trained)
                sums.add(result)
            assert engine.step().applied
        losses.append(sums.means(trained, with_entropy=True)["loss"])
        ends.append(_now(device))
    close_world()
    return model, losses, ends


def train_trl(run: Run, device: torch.device) -> tuple[Any, list[float], list[float]]:
    """The same with TRL's trainer."""
    from datasets import Dataset
    from torch.utils.data import SequentialSampler
    from transformers import TrainerCallback
    from trl import SFTConfig, SFTTrainer

    dataset = Dataset.from_dict(columns_of(run))
    arguments = SFTConfig(
        output_dir=str(Path(run.out, "trainer")), report_to="none", use_cpu=device.type == "cpu", bf16=True,
        per_device_train_batch_size=run.rows_per_pass, gradient_accumulation_steps=run.passes,
        max_steps=run.steps, max_length=run.length, packing=True,
        dataset_kwargs={"skip_prepare_dataset": True},
        learning_rate=LEARNING_RATE, lr_scheduler_type="constant", optim="adamw_torch_fused",
        adam_beta1=0.9, adam_beta2=0.95, weight_decay=0.0, max_grad_norm=1.0,
        gradient_checkpointing=SHAPES[run.shape].gradient_checkpointing,
        gradient_checkpointing_kwargs={"use_reentrant": False},
        logging_steps=1, save_strategy="no", disable_tqdm=True,
    )  # fmt: skip
    model = new_model(run, device, run.attention).float()
    trainer = SFTTrainer(
        model=model, args=arguments, train_dataset=dataset, processing_class=_any_tokenizer()
    )
    # by override: how to ask for it was renamed in the course of transformers 5
    trainer._get_train_sampler = lambda *_: SequentialSampler(dataset)  # type: ignore[method-assign]
    ends: list[float] = []

    class Clock(TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            ends.append(_now(device))

    trainer.add_callback(Clock())
    trainer.train()
    return model, [entry["loss"] for entry in trainer.state.log_history if "loss" in entry], ends


def _any_tokenizer() -> Any:
    """The trainer wants one; the rows are tokens already."""
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    words = Tokenizer(models.WordLevel({"<pad>": 0, "</s>": 1}, unk_token="<pad>"))
    return PreTrainedTokenizerFast(tokenizer_object=words, pad_token="<pad>", eos_token="</s>")


# the account


def summary(records: dict[str, dict[str, Any]]) -> dict[str, Any]:
    """Ratios to TRL's fastest run that did not fail, and how far the losses are apart."""
    result: dict[str, Any] = {"runs": records, "best_trl": None}
    finished = {name: r for name, r in records.items() if name != "ours" and "error" not in r}
    if "error" in records["ours"] or not finished:
        return result
    best = max(finished, key=lambda name: finished[name]["tokens_per_second"])
    ours, theirs = records["ours"], finished[best]
    if len(ours["losses"]) != len(theirs["losses"]):
        raise ValueError(f"{len(ours['losses'])} losses of ours, {len(theirs['losses'])} of TRL's")
    result["best_trl"] = best
    result["speed_ratio"] = ours["tokens_per_second"] / theirs["tokens_per_second"]
    if "peak_memory_gb" in ours:
        result["memory_ratio"] = ours["peak_memory_gb"] / theirs["peak_memory_gb"]
    pairs = list(zip(ours["losses"], theirs["losses"], strict=True))
    result["first_loss_relative_difference"] = abs(pairs[0][0] - pairs[0][1]) / pairs[0][1]
    result["largest_loss_relative_difference"] = max(abs(a - b) / b for a, b in pairs)
    return result


def rendered(records: dict[str, dict[str, Any]]) -> str:
    """One line per run."""
    head = ("", "tokens/s", "s/step", "MFU", "peak GB", "first loss", "last loss")
    rows = []
    for name, record in records.items():
        if "error" in record:
            rows.append((name, "failed", "", "", "", "", ""))
            continue
        mfu, memory = record.get("mfu"), record.get("peak_memory_gb")
        rows.append(
            (
                name, record["tokens_per_second"], record["seconds_per_step"],
                "" if mfu is None else f"{mfu:.1%}", "" if memory is None else f"{memory:.1f}",
                f"{record['losses'][0]:.5f}", f"{record['losses'][-1]:.5f}",
            )
        )  # fmt: skip
    return table(head, rows)


def verdict(result: dict[str, Any]) -> str:
    """One line."""
    if result["best_trl"] is None:
        return "no comparison: a side failed"
    memory = f", {result['memory_ratio']:.2f} x its peak memory" if "memory_ratio" in result else ""
    return (
        f"{result['speed_ratio']:.2f} x the tokens per second of {result['best_trl']}{memory}; losses differ "
        f"by {result['first_loss_relative_difference']:.1e} at the first step, "
        f"at most {result['largest_loss_relative_difference']:.1e}"
    )


if __name__ == "__main__":
    sys.exit(main())
