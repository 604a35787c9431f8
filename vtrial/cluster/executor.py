"""The executor on Ray: how many workers there are, and what each of them has."""

from __future__ import annotations

from collections.abc import Callable, Generator, Sequence
from dataclasses import dataclass, field
from typing import Any

from vtrial.cluster.pool import Pool
from vtrial.cluster.session import connect, ray
from vtrial.execution import MAX_ATTEMPTS, Attempt, Resources, WorkFactory, gpu_shares, threads_that_fit
from vtrial.records import InputError


@dataclass
class RayExecutor:
    """A pool of actors on this machine or on the cluster at `address`.

    Without `workers` there is one for every GPU share, or one for every machine where there is no GPU. The CPU threads
    are shared out as evenly as the machines allow unless `threads` says otherwise. `say` is told when Ray starts.
    """

    workers: int | None = None
    threads: int | None = None
    gpus_per_worker: float | None = None
    address: str | None = None
    say: Callable[[str], None] = lambda text: None
    name: str = "ray"
    cpus: int = field(default=1, init=False)
    """Those of a worker, as Ray counts them."""
    _started_here: bool = field(default=False, init=False)
    _resources: Resources | None = field(default=None, init=False)

    def start(self) -> Resources:
        """Start Ray here or join the cluster; InputError if it cannot give what was asked for."""
        if self._resources is not None:
            return self._resources
        self._started_here = connect(self.address, (self.workers or 1) * (self.threads or 1), self.say)
        machines = [node["Resources"] for node in ray.nodes() if node["Alive"]]
        gpus = [float(machine.get("GPU", 0)) for machine in machines]
        share = self.gpus_per_worker if self.gpus_per_worker is not None else (1.0 if any(gpus) else 0.0)
        if share > max(gpus, default=0):
            self.stop()
            raise InputError(
                f"--gpus-per-worker {share:g}: no machine has more than {max(gpus, default=0):g} GPUs; "
                "give 0 to work on CPUs"
            )
        cores = [int(machine.get("CPU", 0)) for machine, count in zip(machines, gpus) if count >= share]
        workers = self.workers or (
            sum(gpu_shares(count, share) for count in gpus) if share else sum(c > 0 for c in cores)
        )
        workers = max(1, workers)
        fitting = threads_that_fit(cores, workers)
        threads = self.threads or fitting
        # Threads asked for are given, not counted, so that more of them than there are cores still start.
        self.cpus = min(threads, fitting)
        self._resources = Resources(workers, threads, share, "cuda" if share else "cpu")
        return self._resources

    def stop(self) -> None:
        """Shut Ray down if it was started here; leave a cluster we joined alone."""
        self._resources = None
        if self._started_here:
            self._started_here = False
            ray.shutdown()

    def run(self, factory: WorkFactory, items: Sequence[Any], max_attempts: int = MAX_ATTEMPTS) -> Generator[Attempt]:
        """Every attempt at every item, as they end; CannotGoOn if the run must stop. Closing it ends the workers."""
        resources = self.start()
        size = min(resources.workers, len(items))
        pool = Pool(factory, resources, self.cpus, size, max_attempts, self.say)
        try:
            yield from pool.work_through(items)
        finally:
            pool.close()
