"""Step 3: proximal policy optimization (PPO) and its relatives against a reward.

Read in this order: `config.py` (what can be set), `train.py` (the recipe, whose parts are numbered), then its
parts in that order: `rollout.py`, `scoring.py` with `rewards/`, `networks.py`, `advantages.py`,
`minibatches.py`, `update.py` and `loss.py`. Around them: `iterations.py` (when to save, evaluate, stop),
`state.py` (what a checkpoint holds), `evaluate.py`, `metrics.py`, `watchdogs.py`, `data.py` (which prompts an
iteration has).
"""
