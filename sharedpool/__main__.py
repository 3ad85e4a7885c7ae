"""`python -m sharedpool`: the `sharedpool` command."""

from sharedpool.cli import main

if __name__ == "__main__":
    main()
