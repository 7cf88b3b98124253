"""The controller with fake steps in place of the real ones: `python drive.py VERB ...`."""

import dataclasses

from common.stage import Step
from pipeline import plan
from pipeline.__main__ import main

FAKES = {Step.sft: "fake_step", Step.reward: "fake_reward", Step.dpo: "fake_dpo", Step.ppo: "fake_ppo"}
for step, module in FAKES.items():
    plan.STAGES[step] = dataclasses.replace(plan.STAGES[step], module=module)  # type: ignore[index]

if __name__ == "__main__":
    main()
