"""The controller with fake steps in place of the real ones: `python drive.py VERB ...`."""

import dataclasses

from fake_step import FAKES

from pipeline import plan
from pipeline.__main__ import main

for step, module in FAKES.items():
    plan.STAGES[step] = dataclasses.replace(plan.STAGES[step], module=module)  # type: ignore[index]

if __name__ == "__main__":
    main()
