"""The controller: composes the settings, checks them, starts each step, keeps the state. Loads no torch.

Read in this order: `__main__.py` (the verbs), `config.py` and `compose.py` (Hydra's settings, typed),
`checks.py` (what is refused before anything starts), `run.py` (a run, step by step), `state.py` and
`lineage.py` (what is remembered), `verify.py`. Verbs of their own: `plan.py` with `planning/`, `preview.py`,
`report/`, `chat.py`, `doctor`, `reference.py` (explain), `sweep.py`, `submit.py`.
"""
