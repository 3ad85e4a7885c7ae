"""`sharedpool demo`."""
