"""Metrics for TensorBoard, where it is installed (`pip install vtrial[tracking]`)."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from vtrial.course import Line

EVENTS = "events"


def event_writer(folder: Path, step: int) -> Callable[[Line], None] | None:
    """Writes the numbers of a line into `folder`/events; None without TensorBoard.

    What is there of steps after `step`, which are made again, TensorBoard no longer shows.
    """
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError:
        return None
    writer = SummaryWriter(folder / EVENTS, purge_step=step + 1)

    def write(line: Line) -> None:
        for name, value in _numbers(line):
            writer.add_scalar(name, value, line["step"])
        writer.flush()

    return write


def _numbers(line: Line, above: str = "") -> list[tuple[str, float]]:
    found: list[tuple[str, float]] = []
    for name, value in line.items():
        if isinstance(value, dict):
            found += _numbers(value, f"{above}{name}/")
        elif isinstance(value, int | float) and name != "step":
            found.append((above + name, float(value)))
    return found
