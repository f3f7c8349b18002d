"""Guests that the demo, the tests and the benchmarks run; their sources are in the repository's ``guests`` folder."""
