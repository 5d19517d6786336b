"""The same as `python -m sd3.sweep`, for scripts that name this file."""

from sd3.sweep.command import main

if __name__ == "__main__":
    raise SystemExit(main())
