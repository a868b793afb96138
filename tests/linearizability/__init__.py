"""Concurrent histories of a real daemon, through both doors, and whether they are linearizable."""
