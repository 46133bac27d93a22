"""Several processes that are one run: how they find one another, agree, and end together.

startup  who is of the run (flags, Slurm, GKE, Cloud TPU, Open MPI), and `jax.distributed`
group    messages between process 0 and the others; a process that dies is named

Process 0 leads: it owns the run folder and walks the schedule. The others compute training steps
with it. What they tell one another beside the steps' own sums goes over connections of ours, since
JAX's coordination service ends every process from C++, with SIGABRT and no name, when one dies.
"""

from qkd_jax.processes.group import Ended, Group, PeerError
from qkd_jax.processes.startup import start

__all__ = ["Ended", "Group", "PeerError", "start"]
