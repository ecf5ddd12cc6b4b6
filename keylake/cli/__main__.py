"""`python -m keylake.cli`: the same as `keylake`."""

from keylake.cli import main

if __name__ == "__main__":
    main()
