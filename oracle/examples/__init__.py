"""Worked examples of the conformance suite; see oracle/README.md."""
