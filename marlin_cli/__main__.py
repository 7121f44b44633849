"""`python -m marlin_cli` is `marlin`."""

from marlin_cli.cli import main

main()
