"""A page on this machine to separate a file by hand, and to hear and see what comes out (`python -m pipeline demo`)."""
