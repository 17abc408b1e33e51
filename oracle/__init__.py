"""What is right: the contract, the NumPy reference and the conformance suite of the causal conv1d twins.

Importing this package loads nothing but the standard library, so that `oracle.contract` stays usable
without NumPy. See `oracle.contract` for the operations and `oracle.reference` for their definition.
"""

from oracle.contract import CONTRACT_VERSION

__version__ = "0.1.0"  # of the distribution and all three packages

__all__ = ["CONTRACT_VERSION", "__version__"]
