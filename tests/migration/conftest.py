from pathlib import Path

import pytest
from support.streams import Recording, record


@pytest.fixture(scope="session")
def recording(tmp_path_factory: pytest.TempPathFactory) -> Recording:
    """What both sides say in a migration."""
    directory: Path = tmp_path_factory.mktemp("recording")
    return record(directory)
