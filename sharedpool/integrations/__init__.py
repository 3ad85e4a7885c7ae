"""What makes sharedpool feel native in frameworks; each module imports its own, nothing here does."""
