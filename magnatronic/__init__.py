"""The composition root: command line, settings, roles, embedded broker."""

import os

# Read when numpy is loaded, hence here. The products that Milvus Lite asks of its BLAS are tiny, and BLAS threads spin
# while they wait for the next one: measured, 1.6 of 11 ms of CPU a task, on cores that others need.
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")
