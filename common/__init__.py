"""What every step needs and that names no step.

The files at the top load no torch: the controller uses them too. Then five rooms, each of which imports only
those after it and the top: `training/` (engine, checkpoint, export), `decoding/` (sampling on live weights),
`model/` (network and tokenizer), `data/` (rows to batches), `runtime/` (ranks, logs, tracking).
"""
