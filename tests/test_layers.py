"""The layers of docs/architecture.md, held by reading every module's syntax tree."""

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

import dirtylog

ROOT = Path(dirtylog.__file__).parent

LAYERS = (
    # Highest first. A module imports from its own folder and from any layer below its own.
    {"cli"},
    {"control"},
    {"migration", "snapshot", "display", "testing"},
    {"machine"},
    {"trackers"},
    {"memory"},
    {"linux", "guests"},
    {"units"},
    {"errors"},
)
RANK = {folder: -rank for rank, layer in enumerate(LAYERS) for folder in layer}

ABI_MODULES = {"ctypes", "fcntl"}
CLI_CALLS = {"print", "sys.exit", "exit", "quit", "os._exit", "logging.basicConfig"}

MODULES = sorted(ROOT.rglob("*.py"))


def folder_of(path: Path) -> str:
    """The layer's folder, or the module where it stands directly under the package; '' for the package itself."""
    first = path.relative_to(ROOT).parts[0]
    return "" if first == "__init__.py" else first.removesuffix(".py")


def imports(tree: ast.Module) -> Iterator[tuple[int, str]]:
    """Line and full dotted name of whatever is imported, names out of modules included."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"line {node.lineno}: relative import"
            yield from ((node.lineno, f"{node.module}.{alias.name}") for alias in node.names)


def upward_imports(folder: str, tree: ast.Module) -> list[str]:
    found = []
    for line, name in imports(tree):
        package, _, rest = name.partition(".")
        target = rest.partition(".")[0]
        if package != "dirtylog" or target in ("", "__version__", folder):
            continue
        if target not in RANK:
            found.append(f"line {line}: {name} is in no layer")
        elif RANK[target] >= RANK[folder]:
            found.append(f"line {line}: {name}")
    return found


def abi_uses(tree: ast.Module) -> list[str]:
    found = [
        f"line {line}: import of {name}"
        for line, name in imports(tree)
        if name.partition(".")[0] in ABI_MODULES | {"errno"}
    ]
    return found + [
        f"line {node.lineno}: .errno is read"
        for node in ast.walk(tree)
        if isinstance(node, ast.Attribute) and node.attr == "errno" and isinstance(node.ctx, ast.Load)
    ]


def cli_calls(tree: ast.Module) -> list[str]:
    return [
        f"line {node.lineno}: {ast.unparse(node.func)}()"
        for node in ast.walk(tree)
        if isinstance(node, ast.Call) and ast.unparse(node.func) in CLI_CALLS
    ]


def parse(path: Path) -> ast.Module:
    return ast.parse(path.read_text(), str(path))


def name_of(path: Path) -> str:
    return str(path.relative_to(ROOT))


@pytest.mark.parametrize("path", MODULES, ids=name_of)
def test_module_belongs_to_a_layer(path: Path) -> None:
    assert folder_of(path) in RANK.keys() | {""}


@pytest.mark.parametrize("path", [path for path in MODULES if folder_of(path) in RANK], ids=name_of)
def test_module_imports_only_from_below(path: Path) -> None:
    assert upward_imports(folder_of(path), parse(path)) == []


@pytest.mark.parametrize("path", [path for path in MODULES if folder_of(path) != "linux"], ids=name_of)
def test_module_leaves_the_kernels_abi_to_linux(path: Path) -> None:
    assert abi_uses(parse(path)) == []


@pytest.mark.parametrize("path", [path for path in MODULES if folder_of(path) != "cli"], ids=name_of)
def test_module_leaves_printing_and_exiting_to_the_cli(path: Path) -> None:
    assert cli_calls(parse(path)) == []


@pytest.mark.parametrize(
    ("folder", "source"),
    [
        ("memory", "from dirtylog.trackers import Tracker"),
        ("memory", "import dirtylog.cli.main"),
        ("memory", "def late():\n    from dirtylog import migration"),
        ("machine", "from dirtylog.testing import conformance"),
        ("errors", "from dirtylog.units import PAGE_SIZE"),
        ("cli", "from dirtylog import nonsense"),
    ],
)
def test_upward_import_is_found(folder: str, source: str) -> None:
    assert len(upward_imports(folder, ast.parse(source))) == 1


@pytest.mark.parametrize(
    ("folder", "source"),
    [
        ("cli", "from dirtylog import __version__"),
        ("cli", "import dirtylog"),
        ("units", "from dirtylog.errors import UsageError"),
        ("memory", "from dirtylog.memory.bitmap import PageBitmap"),
        ("guests", "import numpy\nfrom dirtylog import errors"),
    ],
)
def test_downward_import_is_fine(folder: str, source: str) -> None:
    assert upward_imports(folder, ast.parse(source)) == []


@pytest.mark.parametrize(
    "source", ["import errno", "from errno import EINTR", "import ctypes.util", "import fcntl as f", "error.errno == 4"]
)
def test_use_of_the_kernels_abi_is_found(source: str) -> None:
    assert len(abi_uses(ast.parse(source))) == 1


@pytest.mark.parametrize("source", ["print(1)", "sys.exit()", "logging.basicConfig()", "def f(): os._exit(1)"])
def test_call_for_the_cli_only_is_found(source: str) -> None:
    assert len(cli_calls(ast.parse(source))) == 1
