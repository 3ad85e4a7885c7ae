"""Django's PostgreSQL backend on a shared pool: `"ENGINE": "sharedpool.integrations.django"`; see `base.py`."""
