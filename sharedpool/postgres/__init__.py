"""PostgreSQL, as broker and workers both see it."""
