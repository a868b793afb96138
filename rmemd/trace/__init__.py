"""Traces: what an engine was asked, in which order, and what came of it; and doing it again."""
