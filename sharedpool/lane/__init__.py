"""The lane, in which connections move between processes: for broker and worker."""
