"""A PPO iteration on the CPU, ours beside a straightforward one: `python -m benchmarks.ppo_cpu`.

Both sides train the same actor and critic (conf/model/llama_4m.yaml with random weights, or `--model FOLDER`)
on the same prompts with the same algorithm and settings, each in a process of its own, in turn; ours is the
real command, the other is ppo_reference.py. How long responses are is a property of the weights
(ppo_workload.py), so that it is alike on both sides: `tail`, mostly short and a few at the limit, and
`uniform`, all at the limit; a pretrained model's responses end where it ends them (`own`). The
draws differ, so the mean length does too, by a few per cent: the verdict is on tokens per CPU-second, those
of prompts and of responses. The reference stands there twice: with usual batch sizes, and with those that are
best for it (`--search` measures them: on one thread, passes over single sequences, which have no padding).

Figures are medians over runs; the first iteration of each is left out. Roll-out, scoring and learning are
wall seconds as each side says. Writes `results/ppo_cpu.json`.
"""

from __future__ import annotations

import argparse
import functools
import sys
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from benchmarks import ppo_workload
from benchmarks.measure import median_of, run_measured, table, threads_environment, write_results
from benchmarks.ppo_sides import (
    PHASES,
    Load,
    OurSettings,
    ReferenceSettings,
    account,
    our_command,
    reference_command,
)

OURS, BEST, USUAL = "ours", "reference, best batches", "reference, batches of 8"
WANTED = 2.0
SKIPPED = 1
RATE = "tokens_per_cpu_second"

REFERENCES: Mapping[str, ReferenceSettings] = {
    BEST: ReferenceSettings(32, 1, 1),
    USUAL: ReferenceSettings(32, 8, 8),
}
CANDIDATES: Mapping[str, ReferenceSettings] = {
    **{f"passes of {size}": ReferenceSettings(32, size, size) for size in (1, 2, 4, 8)},
    **{f"generate {size}, passes of 1": ReferenceSettings(size, 1, 1) for size in (8, 16, 64)},
}

Start = Callable[[Path], tuple[list[str], Path]]
"""From a run's folder to its command and the file that gets a line per iteration."""


def main() -> int:
    """Compare on every kind of lengths, or search; print the tables, write the results."""
    arguments = _parser().parse_args()
    found: dict[str, Any] = {}
    with tempfile.TemporaryDirectory(prefix="ppo_cpu_") as temporary:
        for lengths in arguments.lengths if arguments.model is None else (ppo_workload.OWN,):
            folder = Path(temporary, lengths)
            load = load_of(folder / "workload", lengths, arguments)
            measure = functools.partial(measured, load, folder, arguments.threads)
            print(f"\n{lengths} lengths, {load.made.source}", flush=True)
            if arguments.search:
                found[lengths] = searched(load, measure)
            else:
                sides = sides_of(load, OurSettings(arguments.slots, arguments.micro_batch))
                if arguments.brief:
                    del sides[USUAL]
                found[lengths] = compared(sides, measure, arguments.repeats)
            found[lengths]["prompts"] = load.made.source
    settings = {name: str(value) if name == "model" else value for name, value in vars(arguments).items()}
    del settings["results"]
    result = {"settings": settings, "references": {k: vars(v) for k, v in REFERENCES.items()}, **found}
    of_model = "" if arguments.model is None else f"_{arguments.model.resolve().name}"
    name = f"ppo_cpu{of_model}" + ("_search" if arguments.search else "")
    print(f"written: {write_results(name, result, to=arguments.results)}")
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.ppo_cpu")
    parser.add_argument(
        "--lengths", nargs="+", choices=tuple(ppo_workload.ENDS), default=list(ppo_workload.ENDS)
    )
    parser.add_argument("--prompts", type=int, default=128, help="responses per iteration")
    parser.add_argument("--update", type=int, default=64, help="responses per update")
    parser.add_argument("--max-new-tokens", type=int, default=256)
    parser.add_argument("--iterations", type=int, default=3, help="of each run; the first is left out")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--slots", type=int, default=64, help="ours")
    parser.add_argument("--micro-batch", type=int, default=1, help="ours, in rows of 512 tokens")
    parser.add_argument("--search", action="store_true", help="measure the reference's batch sizes once each")
    parser.add_argument(
        "--model", type=Path, help="a pretrained model's folder; its responses end as they do"
    )
    parser.add_argument("--brief", action="store_true", help="ours and the reference's best batches alone")
    parser.add_argument("--toy", action="store_true", help="a model of some thousand weights")
    parser.add_argument("--results", type=Path, help="folder of the JSON; by default benchmarks/results")
    return parser


def load_of(folder: Path, lengths: str, arguments: argparse.Namespace) -> Load:
    """The iteration that both sides do."""
    model = dict(ppo_workload.TOY) if arguments.toy else None
    pretrained = None if arguments.model is None else arguments.model.resolve()
    made = ppo_workload.prepare(folder, 2 * arguments.prompts, lengths, model=model, pretrained=pretrained)
    return Load(
        made, arguments.iterations, arguments.prompts, arguments.update, arguments.max_new_tokens,
        ppo_workload.MAX_LENGTH, "fp32",
    )  # fmt: skip


def sides_of(load: Load, settings: OurSettings) -> dict[str, Start]:
    """Ours and both references."""
    return {
        OURS: functools.partial(our_command, load, settings),
        **{name: functools.partial(reference_command, load, told) for name, told in REFERENCES.items()},
    }


def measured(load: Load, folder: Path, threads: int, name: str, start: Start) -> dict[str, float]:
    """One run."""
    place = folder / name
    command, metrics = start(place)
    usage, ticks = run_measured(
        command, log=place / "log", environment=threads_environment(threads), steps_file=metrics
    )
    record = account(metrics, ticks, load.iterations, SKIPPED)
    return {**record, "peak_rss_mb": usage.peak_rss_mb}


def compared(
    sides: Mapping[str, Start], measure: Callable[[str, Start], dict[str, float]], repeats: int
) -> dict[str, Any]:
    """All sides in turn, `repeats` times."""
    runs: dict[str, list[dict[str, float]]] = {name: [] for name in sides}
    for number in range(repeats):
        for name, start in sides.items():
            runs[name].append(measure(f"{number} {name}".replace(",", "").replace(" ", "_"), start))
            print(f"{name}, run {number + 1}: {runs[name][-1][RATE]:.1f} tokens/CPU-s", flush=True)
    medians = {name: median_of(records) for name, records in runs.items()}
    ratios = {name: ratios_of(medians[OURS], other) for name, other in medians.items() if name != OURS}
    print(rendered(medians))
    print("\n".join(verdict(name, ratio) for name, ratio in ratios.items()))
    return {"runs": runs, "medians": medians, "ratios": ratios}


def searched(load: Load, measure: Callable[[str, Start], dict[str, float]]) -> dict[str, Any]:
    """Every candidate of the reference once."""
    found = {}
    for number, (name, settings) in enumerate(CANDIDATES.items()):
        start = functools.partial(reference_command, load, settings)
        found[name] = measure(f"candidate_{number}", start)
        print(f"{name}: {found[name][RATE]:.1f} tokens/CPU-s", flush=True)
    print(rendered(found))
    return {"candidates": found}


def ratios_of(ours: Mapping[str, float], other: Mapping[str, float]) -> dict[str, float]:
    """How many times faster ours is: tokens per CPU-second, then seconds per token of each phase."""
    longer = ours["tokens_per_iteration"] / other["tokens_per_iteration"]
    times = ("cpu_seconds_per_iteration", "seconds_per_iteration", *(f"{phase}_seconds" for phase in PHASES))
    per_token = {f"{name}_per_token": other[name] / ours[name] * longer for name in times}
    iteration = other["cpu_seconds_per_iteration"] / ours["cpu_seconds_per_iteration"]
    return {RATE: ours[RATE] / other[RATE], "cpu_seconds_per_iteration": iteration, **per_token}


def verdict(name: str, ratios: Mapping[str, float]) -> str:
    """One line."""
    phases = ", ".join(f"{phase} {ratios[f'{phase}_seconds_per_token']:.2f}" for phase in PHASES)
    met = "met" if ratios[RATE] >= WANTED else "not met"
    return f"{ratios[RATE]:.2f} x the {name} (wanted {WANTED}): {met}; by phase: {phases}"


def rendered(records: Mapping[str, Mapping[str, float]]) -> str:
    """One line per side."""
    names = (
        RATE, "cpu_seconds_per_iteration", *(f"{phase}_seconds" for phase in PHASES), "response_length",
        "peak_rss_mb",
    )  # fmt: skip
    head = ("", "tokens/CPU-s", "CPU-s/iteration", *(f"{phase} s" for phase in PHASES), "length", "MB")
    return table(head, [(side, *(record[name] for name in names)) for side, record in records.items()])


if __name__ == "__main__":
    sys.exit(main())
