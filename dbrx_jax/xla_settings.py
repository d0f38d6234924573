"""What JAX's defaults get wrong for a large model, set by programs that own their process.

The library sets nothing: docs/kernels.md says what to set, and why, where it is used in another program.
"""

import os
from collections.abc import Mapping

# The share of a GPU's memory that JAX takes when it starts. Its own three quarters of an H200 are 113 GB: 132B in
# int8 takes 132. A TPU's runtime gives all there is.
ENVIRONMENT: Mapping[str, str] = {"XLA_PYTHON_CLIENT_MEM_FRACTION": "0.95"}


def own_process() -> None:
    """Sets what the user has not set, in this process' environment; before JAX starts its devices."""
    for name, value in ENVIRONMENT.items():
        os.environ.setdefault(name, value)
