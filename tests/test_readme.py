import re
from pathlib import Path

import pytest

from dirtylog.linux.kvm import KVM

README = Path(__file__).parents[1] / "README.md"


def test_library_example_prints_what_its_comment_says(kvm: KVM, capsys: pytest.CaptureFixture[str]) -> None:
    (example,) = re.findall(r"```python\n(.*?)```", README.read_text(), re.DOTALL)

    exec(compile(example, README, "exec"), {})  # noqa: S102 - our own text

    assert capsys.readouterr().out == "True False\n"
