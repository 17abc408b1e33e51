"""The layout of the `kernels` hub: `python -m hub.build` (or `make hub`) writes it, layers.py becomes part of it."""
