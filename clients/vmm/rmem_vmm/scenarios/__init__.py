"""Scenarios: what a VMM does with its guests' memory, run on a daemon and judged."""
