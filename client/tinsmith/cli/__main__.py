"""`python -m tinsmith.cli` is `tinsmith`."""

from tinsmith.cli import main

main()
