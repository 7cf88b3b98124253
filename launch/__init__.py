"""Where a step's ranks run. `local`: this machine."""
