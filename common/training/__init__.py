"""What turns gradients into a checkpoint and an artifact.

A recipe sees session (ranks, console, metrics, export) and loop (counters, when to save and evaluate). Under
them, in this order: step_data, ds_config, optim, engine, learner, checkpoint (with reshard), ema, frozen,
export (with export_model and export_check; tried out first by rehearsal). forecast, preview: a dry run.
"""
