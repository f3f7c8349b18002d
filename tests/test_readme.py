import re
from pathlib import Path

import pytest

from dirtylog.linux.kvm import KVM

README = Path(__file__).parents[1] / "README.md"


def _run(section: str) -> None:
    """Run the one example of a section."""
    text = README.read_text().partition(f"## {section}\n")[2].partition("\n## ")[0]
    (example,) = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    exec(compile(example, README, "exec"), {})  # noqa: S102 - our own text


def test_library_example_prints_what_its_comment_says(kvm: KVM, capsys: pytest.CaptureFixture[str]) -> None:
    _run("As a library")
    assert capsys.readouterr().out == "True False\n"


def test_example_without_a_machine_prints_what_its_comment_says(capsys: pytest.CaptureFixture[str]) -> None:
    _run("Without a machine")
    assert capsys.readouterr().out == "[slice(42, 43, None)]\n"
