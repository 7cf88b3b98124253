"""Where a step's ranks run: on this machine, on several, in SLURM, in Kubernetes. Loads no torch.

Read in this order: `local.py` (one machine), `rank.py` (what a rank's process does first), `nodes.py`
(machines that meet, over `channel.py`), `follow.py` (those that do what machine 0 says), `ssh.py` with
`remote.py` and `agent.py`, `slurm.py`, `k8s.py`, `supervise.py` (restarts). What listens on the network is in
`docs/launchers.md`.
"""
