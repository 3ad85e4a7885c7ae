"""The broker's loop and its sockets."""
