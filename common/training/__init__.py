"""What turns gradients into a checkpoint and an artifact.

In this order: step_data, ds_config, optim, engine, loop, checkpoint (with reshard), export (tried out first
by rehearsal). What a dry run shows: forecast, preview.
"""
