"""The real ledger and the real caches in a world of random events: see `test_model.py`."""
