"""VMM processes that are killed in random states, some of them while their daemon is restarted."""
