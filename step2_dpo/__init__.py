"""Step 2, the other way: direct preference optimization of the policy.

Read in this order: `config.py` (what can be set), `train.py` (the recipe), `data.py` (prompts to sample),
`reference.py` (log-probabilities of the starting policy, computed once), `loss.py` (DPO, IPO, hinge, cDPO),
`evaluate.py` (what is measured on held-out pairs). `dry_run.py` is what `plan` and `preview` show,
`__main__.py` how a rank starts.
"""
