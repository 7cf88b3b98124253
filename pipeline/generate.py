"""`python -m pipeline generate MODEL --prompts FILE --out FILE.jsonl`: completions of a file of prompts.

Takes what `chat` takes as a policy, and prompts in every form that steps take; the work is done by a process
of its own, `common.decoding.generate`. The same command again goes on where it was interrupted.
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from common.artifacts import write_json
from common.config import to_plain
from common.files import written_with
from common.handoff import check_is_artifact
from common.inference_config import GenerateJob, ManySettings
from common.stage import Role
from common.vllm_fit import SamplingEngine, check_vllm
from launch.local import Job
from launch.supervise import supervise
from pipeline.config import PipelineConfig
from pipeline.options import Options, data_given, data_of, fields_given
from pipeline.sources import artifact_of, models_below

GENERATOR = "common.decoding.generate"

Say = Callable[[str], None]


def generate_verb(arguments: Sequence[str], *, say: Say = print) -> int:
    """The verb. Returns the exit status of its process."""
    given, typed = generate_options(arguments)
    output_dir = PipelineConfig().output_dir
    data = data_of(given.prompts, "--prompts", typed, cached_rows(output_dir))
    settings = fields_given(ManySettings, given)
    check_engine(settings)
    policy = artifact_of(given.model, Role.policy, "MODEL", models_below(output_dir), say)
    check_is_artifact(policy, Role.policy, "MODEL")
    say(f"policy    {policy}")
    whole_context = "max_length" not in typed
    return work(GENERATOR, GenerateJob(policy, data, settings, given.out, whole_context, given.system))


def generate_options(arguments: Sequence[str]) -> tuple[argparse.Namespace, dict[str, Any]]:
    """What was typed after `generate`, and the keys of data. UserError for what cannot be read."""
    others, typed = data_given(arguments)
    parser = Options("generate", "MODEL --prompts FILE --out FILE.jsonl", "Complete a file of prompts.")
    parser.add_argument("model", metavar="MODEL", help="an artifact, a run, a model's folder, a hub model")
    parser.add_argument("--prompts", metavar="FILE", help="as ppo.data.path; further keys as data.KEY=VALUE")
    parser.add_argument("--out", required=True, metavar="FILE", help="a line of JSON for each prompt")
    parser.add_argument("--system", metavar="TEXT", help="system message of the prompts that have none")
    parser.add_fields(ManySettings)
    return parser.parse_args(others), typed


def check_engine(settings: ManySettings) -> None:
    """UserError where vLLM is asked for, and none is installed that fits."""
    if settings.engine is SamplingEngine.vllm:
        check_vllm()


def cached_rows(output_dir: str) -> str:
    """Where tokenized rows are kept, as those of runs."""
    return str(Path(output_dir) / ".cache" / "data")


def work(module: str, job: object) -> int:
    """Have a process of its own do a job that is described by a dataclass; returns its exit status."""
    with tempfile.TemporaryDirectory(prefix="rlhf_job_") as folder:
        written = Path(folder) / "job.json"
        with written_with("TMPDIR=DIR in the environment"):
            write_json(written, to_plain(job))
        return supervise(Job(module, (str(written),))).status
