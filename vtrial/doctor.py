"""What `vtrial doctor` looks at: whether this machine can run vtrial, and what to do where it cannot."""

from __future__ import annotations

import os
import platform
import shutil
import sys
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import get_args

from vtrial.execution import Attempt, Resources, Saved, cpu_count

NEEDED = (
    "numpy",
    "torch",
    "ray",
    "pandas",
    "pyarrow",
    "nibabel",
    "isal",
    "pydantic",
    "scipy",
    "matplotlib",
    "pydicom",
    "totalsegmentator",
    "nnunetv2",
)
MIN_DISK_GB, MIN_MEMORY_GB = 2.0, 8.0


@dataclass(frozen=True)
class Finding:
    """One thing looked at: what was found, and if it is not well, what to do."""

    what: str
    found: str
    ok: bool = True
    remedy: str = ""

    def line(self) -> str:
        """As people read it."""
        told = f"{'ok  ' if self.ok else 'FAIL'} {self.what:<10} {self.found}"
        return told if self.ok else f"{told}\n     {self.what}: {self.remedy}"


def examine() -> list[Finding]:
    """Look at everything; a check that itself breaks is a finding too."""
    checks: tuple[Callable[[], Finding], ...] = (
        _python,
        _packages,
        _torch,
        _cores,
        _memory,
        _disk,
        _model,
        _segmenters,
        _ray,
    )
    findings = []
    for check in checks:
        try:
            findings.append(check())
        except Exception as error:
            what = check.__name__.strip("_")
            findings.append(
                Finding(what, f"{type(error).__name__}: {error}", False, "install vtrial again: pip install -e .")
            )
    return findings


def _python() -> Finding:
    return Finding("python", platform.python_version(), sys.version_info >= (3, 11), "use Python 3.11 or newer")


def _packages() -> Finding:
    found, absent = [], []
    for name in NEEDED:
        try:
            found.append(f"{name} {version(name)}")
        except PackageNotFoundError:
            absent.append(name)
    remedy = f"pip install {' '.join(absent)}"
    return Finding("packages", ", ".join(found) + "".join(f", no {name}" for name in absent), not absent, remedy)


def _torch() -> Finding:
    import torch

    from vtrial.precision import has_bfloat16

    build = f"CUDA {torch.version.cuda}" if torch.version.cuda else "CPU build"
    if not torch.cuda.is_available():
        unused = " (no GPU is usable)" if torch.version.cuda else ""
        fast = has_bfloat16(torch.device("cpu"))
        networks = (
            "bfloat16" if fast else "float32, as this processor has no kernels for bfloat16: several times slower"
        )
        return Finding("torch", f"{torch.__version__}, {build}{unused}, networks in {networks}")
    names = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    return Finding("torch", f"{torch.__version__}, {build}, {', '.join(names)}")


def _cores() -> Finding:
    return Finding("cores", f"{cpu_count()} usable of {os.cpu_count()}")


def _memory() -> Finding:
    total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 1e9
    remedy = "one worker needs up to 8 GB: close other programs, or use a larger machine"
    return Finding("memory", f"{total:.0f} GB", total >= MIN_MEMORY_GB, remedy)


def _disk() -> Finding:
    here, temporary = (shutil.disk_usage(p).free / 1e9 for p in (Path.cwd(), Path(tempfile.gettempdir())))
    ok = min(here, temporary) >= MIN_DISK_GB
    found = f"{here:.0f} GB free here, {temporary:.0f} GB in {tempfile.gettempdir()}"
    return Finding("disk", found, ok, "a subject takes about 50 MB here, and Ray needs room in the temporary folder")


def _model() -> Finding:
    from vtrial.diffusion.weights import list_models
    from vtrial.generation import cascade_plan

    names = list_models()
    for name in names:
        cascade_plan(name, None, None, None)
    found = f"{', '.join(names)}: hashes right" if names else "none bundled"
    return Finding("model", found, bool(names), "install vtrial again, or train a model with `vtrial train`")


def _segmenters() -> Finding:
    from vtrial.records import InputError
    from vtrial.segmentation import Mode, list_segmenters, segmenter_plan
    from vtrial.segmentation.official import official_weights

    names, official = list_segmenters(), []
    for name in names:
        segmenter_plan(name)
    for mode in get_args(Mode):
        try:
            official_weights(mode)
            official.append(mode)
        except InputError:  # no fault: they are needed for real scans alone, and the user's to download
            continue
    weights = ", ".join(official) or "none here (for real scans; vtrial segment tells how to get them)"
    ours = f"{', '.join(names)}: hashes right" if names else "none bundled"
    return Finding("segmenter", f"{ours}; TotalSegmentator's weights: {weights}", bool(names), "install vtrial again")


class _Echo:
    """The smallest work there is."""

    def make(self, item: int) -> int:
        return item

    def save(self, item: int, product: int) -> Saved:
        return Saved({}, {"product": product})


def _echo(resources: Resources) -> _Echo:
    return _Echo()


def _ray() -> Finding:
    from vtrial.cluster import RayExecutor

    executor = RayExecutor(workers=1, threads=1)
    try:
        executor.start()
        attempts: list[Attempt] = list(executor.run(_echo, [1]))
    finally:
        executor.stop()
    ok = len(attempts) == 1 and attempts[0].saved is not None
    return Finding("ray", "starts, runs a task and stops", ok, "see the logs in /tmp/ray, or use --executor local")
