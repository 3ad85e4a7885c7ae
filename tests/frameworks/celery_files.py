"""Celery without a message broker."""

from pathlib import Path
from typing import Any


def through_files(folder: Path) -> dict[str, Any]:
    """An app's settings, by which its messages and results are files in new folders that all users
    may write to."""
    places = {part: folder / part for part in ("messages", "control", "results")}
    for place in places.values():
        place.mkdir()
        place.chmod(0o777)
    return {
        "broker_url": "filesystem://",
        "broker_transport_options": {
            "data_folder_in": str(places["messages"]),
            "data_folder_out": str(places["messages"]),
            "control_folder": str(places["control"]),
            "polling_interval": 0.02,
        },
        "result_backend": places["results"].as_uri(),
    }
