"""Kill -9 of a daemon at every moment that counts, under clients that know what they were told."""
