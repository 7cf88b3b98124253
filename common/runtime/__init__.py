"""A rank and its neighbours: entry, distributed, heartbeat, logs, progress, tracking, performance."""
