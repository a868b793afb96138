"""rmemctl, the command line of rmemd; ``main`` is where to start reading."""
