"""Projections of the log: what stores make of its records, and the runner that feeds them."""
