"""`python -m torch_slmops`: the command line."""

from torch_slmops.cli.main import main

if __name__ == "__main__":
    raise SystemExit(main())
