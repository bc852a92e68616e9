"""``python -m lrkit``: the command line."""

from lrkit.cli import main

if __name__ == "__main__":
    main()
