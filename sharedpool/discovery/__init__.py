"""How the processes of a host find the one broker. No messages and no ZeroMQ here."""
