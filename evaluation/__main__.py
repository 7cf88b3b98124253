"""`python -m evaluation job.json`: see `evaluate.evaluate`."""

from __future__ import annotations

import sys

from common.inference_config import EvaluateJob
from common.runtime.entry import job_main
from evaluation.evaluate import evaluate

if __name__ == "__main__":
    sys.exit(job_main(EvaluateJob, evaluate))
