"""The conformance suite: cases, inputs, judgement, reports. `python -m oracle` is its command line."""
