"""`python -m sd3.probe`."""

from sd3.probe.command import main

if __name__ == "__main__":
    raise SystemExit(main())
