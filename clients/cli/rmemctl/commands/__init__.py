"""The commands, one module per group; each lists its own in ``COMMANDS``."""
