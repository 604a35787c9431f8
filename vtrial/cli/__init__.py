"""The command line: parse, then one call. Nothing heavy is imported before a command runs.

`run.py` makes cohorts, `trial.py` judges them, `collection.py` takes real PET/CT in, `tools.py` is about models and
machines; `options.py` has what they share.
"""

from vtrial.cli import collection, run, tools, trial
from vtrial.cli.options import app


def main() -> None:
    """The `vtrial` command."""
    app()


__all__ = ["app", "collection", "main", "run", "tools", "trial"]
