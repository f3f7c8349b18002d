"""Holds docs/rules.md and the tests together: a comment such as ``# D2, W1`` beside a test cites rules."""

import re
import tokenize
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest

TESTS = Path(__file__).parent
RULES = (TESTS.parent / "docs/rules.md").read_text()
NUMBER = r"[A-Z]\d+"
DEFINED = re.findall(rf"^- \*\*({NUMBER})\b", RULES, re.MULTILINE)
LETTERS = "".join(sorted({rule[0] for rule in DEFINED}))


@cache
def citations() -> tuple[tuple[str, str], ...]:
    """Each rule number in a comment of a test, and where."""
    return tuple(_find_citations())


def _find_citations() -> Iterator[tuple[str, str]]:
    for path in sorted(TESTS.rglob("*.py")):
        with tokenize.open(path) as source:
            for token in tokenize.generate_tokens(source.readline):
                if token.type == tokenize.COMMENT:
                    for rule in re.findall(rf"\b[{LETTERS}]\d+\b", token.string.partition("noqa")[0]):
                        yield rule, f"{path.relative_to(TESTS)}:{token.start[0]}"


@pytest.mark.parametrize("rule", DEFINED)
def test_rule_is_cited_by_a_test(rule: str) -> None:
    assert rule in {cited for cited, _ in citations()}, f"no test says that it holds {rule}"


def test_no_test_cites_a_rule_that_is_not_there() -> None:
    assert [f"{place} cites {rule}" for rule, place in citations() if rule not in DEFINED] == []


def test_rules_are_numbered_from_one_without_gaps() -> None:
    for letter in LETTERS:
        numbers = [int(rule[1:]) for rule in DEFINED if rule[0] == letter]
        assert numbers == list(range(1, len(numbers) + 1))


def test_citations_within_the_rules_exist() -> None:
    assert set(re.findall(rf"`({NUMBER})`", RULES)) <= set(DEFINED)
