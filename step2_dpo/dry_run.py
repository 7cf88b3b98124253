"""Before a run, without a model: `forecast` counts pairs and steps for `plan`; `preview` shows pairs.

A preview is a seeded handful as the model sees them, their lengths, and what was dropped or cut.
"""

from __future__ import annotations

from pathlib import Path

from common.config import load_resolved
from common.counts import DataCounts
from common.decoding.fallbacks import notice_fallbacks
from common.handoff import model_to_preview
from common.model.architecture import CAUSAL_LM
from common.stage import Step
from common.training.forecast import of_pairs
from common.training.preview import preview_pairs
from step2_dpo.config import DPOJob


def forecast(resolved: Path) -> DataCounts:
    """Of the job in `resolved`."""
    job = load_resolved(resolved, DPOJob)
    model = model_to_preview(job.model, job.dpo.policy, "dpo.policy")
    counts = of_pairs(job, Step.dpo, job.dpo.data, job.dpo.train, model)
    notice_fallbacks(model, CAUSAL_LM, job.launch, samples=job.dpo.sampling.num_prompts > 0)
    return counts


def preview(job: DPOJob, folder: Path) -> None:
    """See `common.training.preview.preview_pairs`."""
    preview_pairs(job, Step.dpo, job.dpo.data, job.dpo.policy)
