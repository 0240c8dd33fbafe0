"""`python -m unibus`: the command line."""

from unibus.cli import main

main()
