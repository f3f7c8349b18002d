"""Skips that one variable turns into failures."""

import os

import pytest


def require(name: str, available: object, reason: str) -> None:
    """Skips the test with ``reason`` unless ``available``; fails it when ``DIRTYLOG_REQUIRE`` lists ``name``."""
    if available:
        return
    if name in [entry.strip() for entry in os.environ.get("DIRTYLOG_REQUIRE", "").split(",")]:
        pytest.fail(f"DIRTYLOG_REQUIRE names {name}, but {reason}", pytrace=False)
    pytest.skip(reason)
