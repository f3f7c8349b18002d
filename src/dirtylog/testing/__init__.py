"""Tests for trackers, for whoever makes one: a conformance suite, a model, and writers that never rest.

`TrackerSuite` is what a test class derives from; docs/testing-a-tracker.md shows how.
"""

from dirtylog.testing.contract import Case, ContractError, Differences, Writing
from dirtylog.testing.model import ModelCase, ModelTracker
from dirtylog.testing.stamps import Stamps, Tally
from dirtylog.testing.suite import TrackerSuite

__all__ = [
    "Case",
    "ContractError",
    "Differences",
    "ModelCase",
    "ModelTracker",
    "Stamps",
    "Tally",
    "TrackerSuite",
    "Writing",
]
