"""Run steps on the fake device: `python -m tests.gpu_fake.rank` reads a case per line, prints its outcome.

Torch and the steps are imported once; each case is a fork of that process, and leaves what torch derived in
it to the next (`derived`). A case is JSON: {step, config, size, compile, change}, the path of a run's
resolved.yaml, the ranks of which this is rank 0, whether layers may be compiled, and a function of
`mutations` that is called first; or what `large.train` or `decoding.decode` takes. Its outcome is JSON:
{status, printed, passes}, and what was recorded, as in `record.Record.plain`. With `kernels` in the case they
are counted too.
"""

from __future__ import annotations

import gc
import importlib
import io
import json
import os
import sys
import traceback
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path
from types import SimpleNamespace
from typing import Any

MODULES = {"sft": "step1_sft", "reward": "step2_reward", "dpo": "step2_dpo", "ppo": "step3_ppo"}
SCHEMAS = {"sft": "SFTJob", "reward": "RewardJob", "dpo": "DPOJob", "ppo": "PPOJob"}
IMPORTED = (
    "common.jit", "common.runtime.entry", "deepspeed", "deepspeed.runtime.zero.muon.original_muon",
    "omegaconf", "pandas", "peft", "pyarrow.compute", "rich.console", "setuptools", "sympy",
    "tests.gpu_fake.decoding", "tests.gpu_fake.fused", "tests.gpu_fake.large", "torch._dynamo",
    "torch._inductor.lowering",
    "torch.nn.attention.varlen", "torch.utils.cpp_extension", "transformers.generation.utils",
    "transformers.models.llama.modeling_llama", "transformers.optimization", "transformers.trainer_pt_utils",
)  # fmt: skip
"""What the first case would import."""
ENVIRONMENT = {
    "OMP_NUM_THREADS": "1",
    "TOKENIZERS_PARALLELISM": "false",
    "WANDB_MODE": "disabled",
    "RANK": "0",
}


def main() -> None:
    from tests.gpu_fake import guard

    os.environ.update(ENVIRONMENT, LOCAL_RANK="0")
    guard.load()
    from tests.gpu_fake import cuda

    cuda.install()
    for name in (*(f"{module}.train" for module in MODULES.values()), *IMPORTED):
        importlib.import_module(name)
    gc.freeze()
    print("ready", flush=True)
    for line in sys.stdin:
        print(json.dumps(_in_a_fork(json.loads(line))), flush=True)


def _in_a_fork(case: dict[str, Any]) -> dict[str, Any]:
    """What came of the case; what torch derived in it is known to the cases after it."""
    from tests.gpu_fake import derived

    reading, writing = os.pipe()
    if os.fork() == 0:
        os.close(reading)
        known = derived.count()
        with os.fdopen(writing, "wb") as pipe:
            pipe.write(json.dumps(_outcome(case)).encode() + b"\n" + derived.since(known))
        os._exit(0)
    os.close(writing)
    with os.fdopen(reading, "rb") as pipe:
        text, new = pipe.readline(), pipe.read()
    status = os.wait()[1]
    if not text:
        return {"status": status, "printed": f"the process ended with {status}"}
    derived.take(new)
    gc.freeze()
    found: dict[str, Any] = json.loads(text)
    return found


def _outcome(case: dict[str, Any]) -> dict[str, Any]:
    """Run the case and say what came of it; status 0: it returned."""
    from tests.gpu_fake.device import Device

    printed, device, passes = io.StringIO(), Device(), []
    if case.get("kernels"):
        device.count_kernels()
    status: Any = 1
    with redirect_stdout(printed), redirect_stderr(printed):
        try:
            _prepare(case, passes)
            with device:
                status = _run(case)
        except SystemExit as error:
            status = error.code
        except BaseException:
            traceback.print_exc()
    counted = {} if device.kernels is None else {"kernels": device.kernels.plain()}
    found = {"status": status, "printed": printed.getvalue(), "passes": passes, **counted}
    return {**found, **device.record.plain()}


def _run(case: dict[str, Any]) -> int:
    from tests.gpu_fake import decoding, large

    if "decoded" in case:
        return decoding.decode(case)
    return large.train(case) if "names" in case else _train(case)


def _prepare(case: dict[str, Any], passes: list[list[int]]) -> None:
    from tests.gpu_fake import cuda, fused

    size = case.get("size", 1)
    os.environ.update(WORLD_SIZE=str(size), LOCAL_WORLD_SIZE=str(min(size, 8)))
    cuda.join(0, size)
    if size > 1:
        _work_alone()
    if case.get("compile"):
        fused.install()
    _watch_decoding(passes)
    if change := case.get("change"):
        getattr(importlib.import_module("tests.gpu_fake.mutations"), change)()


def _work_alone() -> None:
    """Without the other ranks' heartbeats and words."""
    from common.runtime import distributed
    from common.training import session

    distributed.start_heartbeat = lambda *_: SimpleNamespace(stop=lambda: None)
    distributed.wait_for_rank0 = session.wait_for_rank0 = lambda world, name: None
    distributed.all_gather_objects = lambda value: [value] * int(os.environ["WORLD_SIZE"])
    _fill_in_responses()


def _fill_in_responses() -> None:
    """What other ranks would find of their responses is 0."""
    import numpy as np

    from step3_ppo import minibatches

    def placed(places: Any, shares: Any, count: int) -> Any:
        found = {name: np.zeros(count, np.float32) for name in shares}
        for name, values in shares.items():
            found[name][np.concatenate(places)] = values
        return found

    minibatches._placed = placed


def _watch_decoding(passes: list[list[int]]) -> None:
    """Of each pass of the decoder: prompts that it takes in, and synchronisations."""
    from common.decoding.scheduler import Scheduler
    from tests.gpu_fake.device import Device

    real = Scheduler.step

    def step(self: Scheduler, through: Any) -> Any:
        device = Device.current
        assert device is not None
        waiting, before = len(self.queue), device.record.syncs.total()
        ended = real(self, through)
        passes.append([waiting - len(self.queue), device.record.syncs.total() - before])
        return ended

    Scheduler.step = step


def _train(case: dict[str, Any]) -> int:
    from common.config import load_resolved
    from common.runtime.entry import on_this_device

    module = MODULES[case["step"]]
    schema = getattr(importlib.import_module(f"{module}.config"), SCHEMAS[case["step"]])
    config = Path(case["config"])
    job = on_this_device(load_resolved(config, schema))
    return int(importlib.import_module(f"{module}.train").train(job, config.parent))


if __name__ == "__main__":
    main()
