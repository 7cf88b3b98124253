"""The controller with a fake SFT step in place of the real one: `python drive.py VERB ...`."""

from common.stage import Role, Stage, Step
from pipeline import plan
from pipeline.__main__ import main

plan.STAGES[Step.sft] = Stage(Step.sft, (), Role.policy, "fake_step")  # type: ignore[index]

if __name__ == "__main__":
    main()
