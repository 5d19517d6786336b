"""`python -m sd3.sweep`."""

from sd3.sweep.command import main

if __name__ == "__main__":
    raise SystemExit(main())
