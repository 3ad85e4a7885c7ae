"""A Django project whose processes share three connections, however many there are.

    $ python examples/django_project/manage.py migrate
    $ gunicorn -w 4 --chdir examples/django_project project.wsgi

DATABASE_URL must name the database, such as postgresql://user:password@localhost:5432/app.

Then http://127.0.0.1:8000/ stores a note. It shows which worker and which PostgreSQL backend did
that, and how many connections the pool has on the server: never more than three. `manage.py
runserver` works as well. `manage.py test` has its own database, and so its own pool.
"""

import os
import sys

from django.core.management import execute_from_command_line

if __name__ == "__main__":
    os.environ.setdefault("DJANGO_SETTINGS_MODULE", "project.settings")
    execute_from_command_line(sys.argv)
