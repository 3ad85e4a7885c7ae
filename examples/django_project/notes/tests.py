from django.db import connection
from django.test import TestCase, TransactionTestCase

from .models import Note


class NoteTest(TestCase):
    def test_the_page_stores_a_note(self):
        answer = self.client.get("/").json()
        assert Note.objects.count() == 1
        assert answer["connections"] <= 3


class DatabaseTest(TransactionTestCase):
    def test_tests_have_a_database_of_their_own(self):
        Note.objects.create(text="mine")
        with connection.cursor() as cursor:
            cursor.execute("SELECT current_database()")
            assert cursor.fetchone()[0].startswith("test_")
