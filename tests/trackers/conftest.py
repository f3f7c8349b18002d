import pytest
from support.own_memory import SHARED, anonymous, as_array
from support.watches import EXACT, PAGES, Array, supported


@pytest.fixture(params=EXACT)
def tracker(request: pytest.FixtureRequest) -> str:
    return supported(request.param)


@pytest.fixture
def array() -> Array:
    return as_array(anonymous(PAGES, SHARED))
