"""Studies on executors of other packages: Ray, submitit's jobs, and a pool of Dask."""

from test_study import dask_pool as test_dask_pool
from test_study import place, survives_kills, undisturbed

__all__ = ["place", "test_dask_pool", "undisturbed"]


def test_ray_survives_kills(place, tmp_path, undisturbed):
    """A worker of Ray is killed."""
    survives_kills(place, tmp_path, undisturbed, "ray")


def test_jobs_survive_kills(place, tmp_path, undisturbed):
    """A job of submitit is killed; the files of jobs that came to their ends are gone."""
    folder = tmp_path / "jobs"
    survives_kills(place, tmp_path, undisturbed, "slurm", "2", "14", f"cluster=local,folder={folder}")
    assert len({path.name.partition("_")[0] for path in folder.iterdir()}) == 1, "the job that died left its log alone"
