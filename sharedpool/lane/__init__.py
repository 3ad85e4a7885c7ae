"""The lane, in which connections move between processes: what its ends in broker and worker share."""
