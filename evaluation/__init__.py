"""What a model is worth on rows of the user's: `python -m pipeline evaluate` starts it as a process.

Read in this order: `evaluate.py` (what is measured on which rows, and how two models are compared),
`demonstrations.py`, `preferences.py` and `completions.py` (one kind of rows each), `inference_model.py` (a
model), `values.py` (the noun between them, and what is printed and kept). What is measured is computed by the
steps' own functions, so that numbers are those that a run logs. Trains nothing. It stands above the steps,
which do not know of it.
"""
