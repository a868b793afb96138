"""The journal of a long run, cut at every byte and with bits flipped: its longest valid prefix."""
