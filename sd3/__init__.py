"""The machinery around the algorithm files in the root: flags, files, engine, runs, the probe and the sweep."""
