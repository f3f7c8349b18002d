"""The tutorial, run: its blocks in order, in one namespace, in a folder that is empty at first."""

import re
from importlib.util import find_spec
from pathlib import Path

import pytest
from support.own_memory import require_write_watch
from support.require import require

TUTORIAL = Path(__file__).parents[1] / "docs/tutorial.md"
_BLOCK = re.compile(r"```python\n(?P<code>.*?)```\n(?:```text\n(?P<output>.*?)```)?", re.DOTALL)


def test_each_block_prints_what_stands_below_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    require("matplotlib", find_spec("matplotlib"), "matplotlib is not installed: pip install 'dirtylog[plot]'")
    require_write_watch()
    monkeypatch.chdir(tmp_path)
    namespace: dict[str, object] = {}
    blocks = list(_BLOCK.finditer(TUTORIAL.read_text()))
    assert len(blocks) == TUTORIAL.read_text().count("```python")
    for block in blocks:
        exec(compile(block["code"], TUTORIAL, "exec"), namespace)  # noqa: S102 - our own text
        assert capsys.readouterr().out == (block["output"] or ""), block["code"]
    assert (tmp_path / "dirty-pages.png").read_bytes().startswith(b"\x89PNG")


def test_ten_lines_are_ten() -> None:
    (example,) = re.findall(r"```python\n(import dirtylog\n.*?)```", TUTORIAL.read_text(), re.DOTALL)
    assert len([line for line in example.splitlines() if line]) == 10


@pytest.mark.parametrize("link", re.findall(r"\]\((?!http)([^)]+)\)", TUTORIAL.read_text()))
def test_what_it_links_to_is_there(link: str) -> None:
    assert (TUTORIAL.parent / link).exists()
