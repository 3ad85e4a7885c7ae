"""Django's PostgreSQL backend on a shared pool: `"ENGINE": "sharedpool.integrations.django"`.

Django imports `base.py`.
"""
