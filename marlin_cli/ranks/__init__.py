"""The processes (ranks) that `mlx.launch` or mpirun starts for one job: who they are, what they gather, and who is gone.

What is gathered travels over `mx.distributed`, by the backend that the launcher chose (ring, JACCL, NCCL, MPI). Those
have no common answer to a peer that dies: one raises after a dozen lines of its own, another waits for ever. So every
rank also holds a TCP connection to rank 0, through which they agree to begin each collective and learn at once, from
the closed connection, that one is gone; from missing beats, that its machine is. The job ends then: main threads are
interrupted as by Ctrl-C, which saves what is worth saving, and rank 0 says in one line which rank it was.
"""

from marlin_cli.ranks.job import ALONE, FoundByAll, Ranks, joined
from marlin_cli.ranks.launch import Launch, is_follower, launch_of

__all__ = ["ALONE", "FoundByAll", "Launch", "Ranks", "is_follower", "joined", "launch_of"]
