"""A simulation of the whole engine in one thread, in which all that could go wrong does, by a seed."""
