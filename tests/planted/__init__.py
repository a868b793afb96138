"""Bugs planted in the real code, one kind for each that comparable systems had; all are killed."""
