"""`sharedpool demo`: many processes, few connections, and a live view of them."""
