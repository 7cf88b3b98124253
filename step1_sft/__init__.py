"""Step 1: supervised fine-tuning of the policy.

Read in this order: `config.py` (what can be set), `train.py` (the recipe), `data.py` (its tokenizer),
`loss.py` (what is minimised), `evaluate.py` (what is measured on held-out rows).
`dry_run.py` is what `plan` and `preview` show, `__main__.py` how a rank starts.
"""
