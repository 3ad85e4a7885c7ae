"""A Django project whose processes share three connections, however many they are.

    $ python examples/django_project/manage.py migrate
    $ gunicorn -w 4 --chdir examples/django_project project.wsgi

DATABASE_URL says where PostgreSQL is: export
DATABASE_URL=postgresql://user:password@localhost:5432/app

Then http://127.0.0.1:8000/ stores a note, and shows which worker and which PostgreSQL connection
did, and how many connections the pool has on the server at that moment: never more than three. It
is the same with `manage.py runserver`; `manage.py test` has a database, and so a pool, of its own.
"""

import os
import sys

from django.core.management import execute_from_command_line

if __name__ == "__main__":
    os.environ.setdefault("DJANGO_SETTINGS_MODULE", "project.settings")
    execute_from_command_line(sys.argv)
