"""Step 2: a reward model from preference pairs.

Read in this order: `config.py` (what can be set), `train.py` (the recipe), `data.py` (pairs to calibrate on
and to compare an export with), `loss.py` (Bradley-Terry), `evaluate.py` (accuracy, calibration, length bias).
`dry_run.py` is what `plan` and `preview` show, `__main__.py` how a rank starts.
"""
