import importlib.metadata
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from dirtylog.errors import HostError
from tools.lab import contents


def test_closure_has_what_distributions_require() -> None:
    found = set(contents.closure(["dirtylog", "pytest"]))
    assert {"dirtylog", "numpy", "msgspec", "rich", "pygments", "pytest", "pluggy"} <= found


def test_closure_leaves_out_what_only_extras_require() -> None:
    assert not {"mypy", "ruff"}.intersection(contents.closure(["dirtylog"]))


def test_closure_takes_optional_distributions_where_they_are() -> None:
    found = contents.closure(["pluggy"], optional=["iniconfig", "no-such-distribution"])
    assert set(found) == {"pluggy", "iniconfig"}


def test_missing_distribution_is_named() -> None:
    with pytest.raises(HostError, match="the package no-such-distribution is not installed"):
        contents.closure(["no.such_distribution"])


def test_files_of_a_distribution_have_its_modules_and_libraries_but_not_its_tests() -> None:
    files = set(contents.distribution_files({"numpy": importlib.metadata.distribution("numpy")}))
    root = Path(np.__file__).parent
    assert {root / "__init__.py", *root.glob("_core/*.so")} <= files
    assert not [path for path in files if "tests" in path.parts]


def test_files_of_python_have_what_runs_it() -> None:
    files = {path.resolve() for path in contents.python_files()}
    assert {Path(sys.executable).resolve(), Path(subprocess.__file__).resolve()} <= files
    assert any(path.name.startswith("_struct") or path.name == "struct.py" for path in files)


def test_libraries_are_those_that_the_interpreter_has_loaded() -> None:
    loaded = {Path(line.split()[-1]) for line in Path("/proc/self/maps").read_text().splitlines() if "/libc.so" in line}
    assert {path.resolve() for path in loaded} <= {
        path.resolve() for path in contents.libraries([Path(sys.executable)])
    }


def test_project_has_sources_and_tests_but_nothing_compiled_or_hidden(tmp_path: Path) -> None:
    wanted = ["src/package/module.py", "tests/test_it.py", "pyproject.toml"]
    for name in [*wanted, "src/package/__pycache__/module.pyc", ".venv/bin/python", "dist/package.whl"]:
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()
    assert {str(path.relative_to(tmp_path)) for path in contents.project_files(tmp_path)} == set(wanted)


def test_first_program_compiles() -> None:
    first_line, _, program = contents.INIT.decode().partition("\n")
    assert first_line.startswith("#!/")
    compile(program, "/init", "exec")
