"""The same as `python -m sd3.probe`, for scripts that name this file."""

from sd3.probe.command import main

if __name__ == "__main__":
    raise SystemExit(main())
