"""`python -m vtrial.cli` is `vtrial`."""

from vtrial.cli import main

main()
