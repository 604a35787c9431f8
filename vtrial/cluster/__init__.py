"""Ray, which nothing else here imports: `executor.py` makes many things, with `pool.py`; `training.py` trains one."""

from vtrial.cluster.executor import RayExecutor

__all__ = ["RayExecutor"]
