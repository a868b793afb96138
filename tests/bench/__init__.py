"""Performance, shown as ratios beside a floor or peer; run with ``make bench``."""
