"""The settings that a project needs to start, and DATABASES."""

import os

from psycopg2.extensions import parse_dsn

server = parse_dsn(os.environ["DATABASE_URL"])

DATABASES = {
    "default": {
        "ENGINE": "sharedpool.integrations.django",
        "NAME": server["dbname"],
        "USER": server.get("user", ""),
        "PASSWORD": server.get("password", ""),
        "HOST": server.get("host", ""),
        "PORT": server.get("port", ""),
        # The limit over all processes of this project, and how many seconds a request may wait.
        "OPTIONS": {"max_conn": 3, "timeout": 10},
    }
}

SECRET_KEY = "for an example only"
DEBUG = True
ALLOWED_HOSTS = ["127.0.0.1", "localhost"]
ROOT_URLCONF = "project.urls"
INSTALLED_APPS = ["notes"]
DEFAULT_AUTO_FIELD = "django.db.models.BigAutoField"
USE_TZ = True
