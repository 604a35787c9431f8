"""Ray started here, or joined; with the settings that must stand before it is imported."""

from __future__ import annotations

import logging
import os
import signal
import socket
from collections.abc import Callable
from typing import Any
from urllib.parse import urlsplit

from vtrial.execution import CannotGoOn, cpu_count, end_on_sigterm
from vtrial.memory import ONE_ARENA
from vtrial.records import InputError

# Before ray is imported. No usage reports; no second environment in the workers under `uv run` (it copies the folder
# and breaks relative paths); an actor without GPUs must not see any.
os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
os.environ.setdefault("RAY_ENABLE_UV_RUN_RUNTIME_ENV", "0")
os.environ.setdefault("RAY_DEDUP_LOGS", "1")
os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "1")

import ray as _ray
from ray.exceptions import RayError

__all__ = ["RayError", "connect", "ray"]

ray: Any = _ray  # typed in part only

ANSWER_S = 10.0  # Ray itself waits for minutes where nobody listens
OBJECT_STORE_BYTES = 128 * 2**20  # rows only; Ray's default is 30 % of the memory


def connect(address: str | None, cores_wanted: int, say: Callable[[str], None]) -> bool:
    """Join the cluster at `address` (or RAY_ADDRESS), or start Ray here with so many cores at least; whether it was
    started here. `say` is told which. InputError if no cluster answers, CannotGoOn if Ray does not start."""
    if ray.is_initialized():
        return False
    # Ray prints a paragraph on stdout for every death of a worker, which we tell in a line.
    if hasattr(ray._private.worker, "print_to_stdstream"):
        ray._private.worker.print_to_stdstream = lambda *unused, **unused_too: None
    origin = "--address" if address else "RAY_ADDRESS"
    address = address or os.environ.get("RAY_ADDRESS")
    options: dict[str, Any] = {
        "log_to_driver": False,
        "logging_level": logging.ERROR,
        "runtime_env": {"env_vars": ONE_ARENA},
    }
    if address:
        say(f"Joining the Ray cluster at {address}")
        try:
            _knock(address)
            _init(address=address, **options)
        except (OSError, RayError, RuntimeError, ValueError) as error:
            raise InputError(
                f"{origin} {address}: no Ray cluster answers there ({error}); give host:port of its head, or leave "
                f"{origin} out to start Ray here"
            ) from None
        return False
    say(f"Starting Ray on this machine with {cpu_count()} CPU cores (a few seconds)")
    cores = max(cpu_count(), cores_wanted)
    try:
        _init(num_cpus=cores, include_dashboard=False, object_store_memory=OBJECT_STORE_BYTES, **options)
    except Exception as error:  # of any kind: a node that is too slow to start raises no subclass
        ray.shutdown()
        raise CannotGoOn(f"Ray does not start here ({error}); see `vtrial doctor`, or give --executor local") from None
    return True


def _knock(address: str) -> None:
    """OSError or ValueError if nobody listens at host:port or ray://host:port; other addresses are left to Ray."""
    place = urlsplit(address if "://" in address else f"//{address}")
    if place.scheme in ("", "ray") and place.port is not None:
        socket.create_connection((place.hostname, place.port), timeout=ANSWER_S).close()


def _init(**options: Any) -> None:
    """`ray.init`, during which and after which SIGTERM is an interrupt: Ray's own handlers exit with 15 or abort."""
    try:
        ray.init(**options)
    except SystemExit as end:
        if end.code != signal.SIGTERM:
            raise
        raise KeyboardInterrupt from None
    finally:
        end_on_sigterm()
