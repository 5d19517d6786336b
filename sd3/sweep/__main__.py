"""`python -m sd3.sweep`."""

from sd3 import streams

if __name__ == "__main__":
    streams.begin()  # first, so that a stop during imports is quiet

from sd3.sweep.command import main

if __name__ == "__main__":
    raise SystemExit(main())
