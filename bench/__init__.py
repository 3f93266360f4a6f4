"""Benchmarks: how fast the platform's parts are, beside the libraries that do the same work, in one run.

``python -m bench`` prints one table; docs/benchmarks.md says what each number means.
"""

import magnatronic  # noqa: F401 (before numpy, as in the platform's own processes: it sets how BLAS runs)
