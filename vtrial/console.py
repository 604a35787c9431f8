"""What commands say: one progress bar on a terminal, plain lines elsewhere, JSON for machines, and exit codes.

0: done. 1: ran, but some subjects failed or the run had to stop. 2: bad input. 130: interrupted.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stdout
from typing import TYPE_CHECKING, Any, NoReturn

from vtrial.execution import CannotGoOn, end_on_sigterm
from vtrial.records import InputError

if TYPE_CHECKING:
    from rich.console import RenderableType

    from vtrial.execution import Progress
    from vtrial.measurement import MeasureSummary
    from vtrial.production import RunSummary
    from vtrial.segmentation import SegmentSummary

FAILED, BAD_INPUT, INTERRUPTED = 1, 2, 130


class Console:
    """Says things to people on stderr, or with `as_json` one JSON document to a machine on stdout."""

    def __init__(self, *, as_json: bool) -> None:
        self.as_json = as_json
        self._stdout = sys.stdout

    def say(self, text: str) -> None:
        """A line for people."""
        if not self.as_json:
            print(text, file=sys.stderr, flush=True)

    def result(self, document: dict[str, Any], told: RenderableType) -> None:
        """The outcome of a command: `document` for machines, or what is told to people."""
        if self.as_json:
            print(json.dumps(document, indent=2, default=str), file=self._stdout, flush=True)
        elif isinstance(told, str):
            print(told, file=self._stdout, flush=True)
        else:
            from rich.console import Console as RichConsole

            RichConsole(file=self._stdout).print(told)

    def run_ended(self, summary: RunSummary) -> None:
        """Say how a run ended and where things are; leaves with code 1 if subjects failed."""
        from vtrial.storage import place

        volumes = place(summary.location, "scans") if summary.layout == "scans" else summary.location
        places = {"scans": volumes, "table": place(summary.location, "subjects.parquet"), "preview": summary.preview}
        document = {
            "run": summary.location,
            "subjects": summary.total,
            "done": summary.done,
            "made_now": summary.new,
            "failed": summary.failures,
            "outside_support": summary.outside_support,
            "seconds": round(summary.seconds, 1),
            **places,
        }
        left = "nothing was left to do" if summary.done == summary.total else "none made now"
        made = f"{summary.new} made now in {summary.seconds:.0f} s" if summary.new else left
        lines = [f"{summary.done} of {summary.total} subjects are done, {made}"]
        lines += failed_lines(summary.failures, "see the column error of the table")
        if summary.outside_support:
            lines.append(f"  {summary.outside_support} outside what the model was trained on (column extrapolated)")
        lines += [f"  {name:<8} {place}" for name, place in places.items() if place is not None]
        self.result(document, "\n".join(lines))
        if summary.failures:
            raise SystemExit(FAILED)

    def fail(self, problems: list[str], code: int) -> NoReturn:
        """Tell what went wrong and leave with `code`."""
        if self.as_json:
            print(json.dumps({"problems": problems, "exit_code": code}, indent=2), file=self._stdout, flush=True)
        else:
            print("\n".join(f"error: {problem}" for problem in problems), file=sys.stderr, flush=True)
        raise SystemExit(code)

    @contextmanager
    def guard(self) -> Iterator[None]:
        """Turn what may go wrong into one message and an exit code; anything else is a bug and keeps its traceback.

        What libraries print meanwhile goes to stderr: stdout is for the result.
        """
        end_on_sigterm()
        try:
            with redirect_stdout(sys.stderr):
                yield
        except InputError as error:
            self.fail(list(error.problems), BAD_INPUT)
        except CannotGoOn as error:
            self.fail([str(error)], FAILED)
        except KeyboardInterrupt:
            self.fail(["interrupted; what is made is safe: run the same command to go on"], INTERRUPTED)

    def steps_ended(self, done: str, summary: SegmentSummary | MeasureSummary, where: str) -> None:
        """Say how segmenting or measuring ended ("segmented", …), and where it is; code 1 if subjects failed."""
        lines = [f"{summary.done} of {summary.total} subjects are {done}, {summary.new} now in {summary.seconds:.0f} s"]
        lines += [*failed_lines(summary.failures, "the same command tries them again"), where]
        self.result(vars(summary), "\n".join(lines))
        if summary.failures:
            raise SystemExit(FAILED)

    @contextmanager
    def progress(self, step: str = "") -> Iterator[Any]:
        """A `report` for runs: a bar on a terminal, a line for each subject elsewhere, nothing with JSON.

        `step` says which one this is, where a command has several.
        """
        if self.as_json:
            yield lambda progress: None
        elif sys.stderr.isatty():
            with _bar(step or "subjects") as report:
                yield report
        else:
            yield lambda progress: _tell_line(progress, step)


def failed_lines(failures: dict[str, str], rest: str) -> list[str]:
    """The first failures, and what to do about the `rest`."""
    lines = [f"  failed: {subject}: {error}" for subject, error in list(failures.items())[:10]]
    return lines + ([f"  … and {len(failures) - 10} more; {rest}"] if len(failures) > 10 else [])


def _tell_line(progress: Progress, step: str) -> None:
    attempt = progress.latest
    if attempt is None:
        return
    told = f"ok, {attempt.seconds:.1f} s" if attempt.saved else f"attempt {attempt.number}: {attempt.error}"
    if attempt.final and not attempt.saved:
        told = f"given up after {told}"
    finished = progress.done + progress.failed
    named = f"{step} " if step else ""
    print(f"{named}[{finished}/{progress.total}] {attempt.item.subject_id}: {told}", file=sys.stderr, flush=True)


@contextmanager
def _bar(step: str) -> Iterator[Any]:
    from rich.console import Console as RichConsole
    from rich.progress import (
        BarColumn,
        MofNCompleteColumn,
        Progress,
        TextColumn,
        TimeElapsedColumn,
        TimeRemainingColumn,
    )

    with Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TextColumn("left"),
        TimeRemainingColumn(),
        console=RichConsole(stderr=True),
    ) as bar:
        task = bar.add_task(step, total=None, visible=False)  # a step with nothing to do shows no bar

        def report(progress: Any) -> None:
            bar.update(task, visible=True, total=progress.total, completed=progress.done + progress.failed)
            attempt = progress.latest
            if attempt is not None and not attempt.saved:
                verdict = "given up" if attempt.final else "tried again"
                bar.console.print(f"{attempt.item.subject_id}: {attempt.error} ({verdict})", highlight=False)

        yield report
