"""Command line of the conformance suite: `python -m oracle --help`."""

from oracle.conformance.commands import main

if __name__ == "__main__":
    raise SystemExit(main())
