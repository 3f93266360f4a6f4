"""The composition root: command line, settings, roles, embedded broker."""
