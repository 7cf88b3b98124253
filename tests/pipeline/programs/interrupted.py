"""The controller with an SFT that is interrupted: `python interrupted.py VERB ...`."""

import dataclasses
import os

from common.stage import Step
from pipeline import plan
from pipeline.__main__ import main

os.environ["CONTROLLER"] = str(os.getpid())
plan.STAGES[Step.sft] = dataclasses.replace(plan.STAGES[Step.sft], module="interrupted_step")  # type: ignore[index]

if __name__ == "__main__":
    main()
