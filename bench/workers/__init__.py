"""The programs under test: one module a system, each run as a process of its own with the same task."""
