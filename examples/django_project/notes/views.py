import os

from django.db import connection
from django.http import HttpRequest, JsonResponse

from .models import Note


def index(request: HttpRequest) -> JsonResponse:
    Note.objects.create(text=f"by {os.getpid()}")
    with connection.cursor() as cursor:
        cursor.execute(
            "SELECT pg_backend_pid(), count(*) FROM pg_stat_activity"
            " WHERE datname = current_database() AND application_name LIKE %s",
            ["sharedpool django default %"],
        )
        backend, connections = cursor.fetchone()
    return JsonResponse({"worker": os.getpid(), "backend": backend, "connections": connections})
