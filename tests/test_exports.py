import importlib
import inspect
import pkgutil
from types import ModuleType

import pytest

import dirtylog

PACKAGES = ["memory", "trackers", "machine", "migration", "display", "testing", "control.qmp"]
MODULES = [module.name for module in pkgutil.walk_packages(dirtylog.__path__, "dirtylog.")]


@pytest.fixture(params=PACKAGES)
def package(request: pytest.FixtureRequest) -> ModuleType:
    return importlib.import_module(f"dirtylog.{request.param}")


def test_every_exported_name_exists_and_is_documented(package: ModuleType) -> None:
    for name in package.__all__:
        value = getattr(package, name)
        assert inspect.getdoc(value) or not callable(value), name


def test_exports_are_sorted_and_few(package: ModuleType) -> None:
    assert package.__all__ == sorted(package.__all__)
    assert len(package.__all__) <= 40


@pytest.mark.parametrize("name", MODULES)
def test_module_says_what_it_is_for(name: str) -> None:
    assert importlib.import_module(name).__doc__


def test_version_is_the_installed_package_s() -> None:
    metadata = pytest.importorskip("importlib.metadata")
    try:
        installed = metadata.version("dirtylog")
    except metadata.PackageNotFoundError:
        pytest.skip("dirtylog is run from its source, not installed")
    assert installed == dirtylog.__version__
