"""How the processes of one host find the one broker."""
