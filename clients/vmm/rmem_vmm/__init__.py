"""A multi-process VMM on rmemd: one process per VM, one per vCPU, and the demo built from them."""
