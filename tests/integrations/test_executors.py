"""Studies on executors of other packages: Ray, and a pool of Dask."""

from test_study import dask_pool as test_dask_pool
from test_study import place, undisturbed
from test_study import ray_survives_kills as test_ray_survives_kills

__all__ = ["place", "test_dask_pool", "test_ray_survives_kills", "undisturbed"]
