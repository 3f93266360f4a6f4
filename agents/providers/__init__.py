"""Language models behind one port: ``extractive``, which needs nothing, and the vendors' adapters."""
