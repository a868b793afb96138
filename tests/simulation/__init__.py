"""The whole engine in one thread, where whatever can go wrong does, as a seed has it."""
