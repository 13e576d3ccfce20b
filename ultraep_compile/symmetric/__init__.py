"""Memory that every rank of a group can address: named regions, address tables for kernels, waits that end.

    regions = {"slots": Region((2, 4096), torch.bfloat16), "inbox": counters(ranks)}
    pool = open_pool(regions, group, torch.device("cuda", 0))
    pool.region("slots").zero_()          # this rank's own memory
    pool.addresses("slots")               # int64 [R]: where the region starts on each rank, for kernels
    pool.close()
"""

from ultraep_compile.symmetric.open import open_pool, open_virtual_pools
from ultraep_compile.symmetric.pool import SymmetricPool
from ultraep_compile.symmetric.regions import Region, counters

__all__ = ["Region", "SymmetricPool", "counters", "open_pool", "open_virtual_pools"]
