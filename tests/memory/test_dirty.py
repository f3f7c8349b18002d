import numpy as np
import pytest
from support.oracles import to_bits, to_words

from dirtylog.errors import UsageError
from dirtylog.memory import Client, DirtyMemory, DirtySnapshot, PageBitmap
from dirtylog.units import PAGE_SIZE


def emptied(pages: int) -> DirtyMemory:
    dirty = DirtyMemory(pages)
    for client in Client:
        dirty.fetch_and_clear(0, pages, client)
    return dirty


@pytest.mark.parametrize("client", Client)
def test_new_memory_is_dirty_for_every_client(client: Client) -> None:  # D11
    dirty = DirtyMemory(100)

    assert dirty.count(client) == 100
    assert to_bits(dirty.fetch_and_clear(0, 100, client)) == set(range(100))
    assert dirty.count(client) == 0


def test_marking_reaches_the_named_clients_only() -> None:
    dirty = emptied(100)
    dirty.mark(60, 10, Client.DISPLAY | Client.MIGRATION)

    assert [dirty.count(client) for client in (Client.DISPLAY, Client.CODE, Client.MIGRATION)] == [10, 0, 10]
    assert not dirty.any(0, 60, Client.DISPLAY)
    assert dirty.any(69, 1, Client.DISPLAY)
    assert not dirty.any(70, 30, Client.DISPLAY)


def test_merging_reaches_the_named_clients_only() -> None:
    dirty = emptied(100)
    dirty.merge(to_words([0, 3], 10), 70, 10, Client.CODE | Client.MIGRATION)

    assert to_bits(dirty.fetch_and_clear(0, 100, Client.MIGRATION)) == {70, 73}
    assert to_bits(dirty.fetch_and_clear(0, 100, Client.CODE)) == {70, 73}
    assert dirty.count(Client.DISPLAY) == 0


def test_clearing_for_one_client_leaves_the_others() -> None:  # D4
    dirty = DirtyMemory(100)
    dirty.fetch_and_clear(10, 80, Client.DISPLAY)

    assert dirty.count(Client.DISPLAY) == 20
    assert dirty.count(Client.MIGRATION) == 100


@pytest.mark.parametrize("clients", [Client(0), Client.DISPLAY | Client.CODE])
def test_questions_are_about_exactly_one_client(clients: Client) -> None:
    dirty = DirtyMemory(10)
    with pytest.raises(UsageError, match="not one client"):
        dirty.count(clients)
    with pytest.raises(UsageError, match="not one client"):
        dirty.any(0, 1, clients)
    with pytest.raises(UsageError, match="not one client"):
        dirty.fetch_and_clear(0, 1, clients)


def test_snapshot_answers_for_every_page_that_a_range_touches() -> None:  # D10
    snapshot = DirtySnapshot(10, PageBitmap(3, np.array([0b010], np.uint64)))

    assert snapshot.is_dirty(11 * PAGE_SIZE, PAGE_SIZE)
    assert snapshot.is_dirty(11 * PAGE_SIZE - 1, 2)
    assert not snapshot.is_dirty(11 * PAGE_SIZE - 1, 1)
    assert snapshot.is_dirty(12 * PAGE_SIZE - 1, 1)
    assert not snapshot.is_dirty(12 * PAGE_SIZE, PAGE_SIZE)


@pytest.mark.parametrize(
    ("offset", "size"), [(10 * PAGE_SIZE - 1, 1), (13 * PAGE_SIZE, 1), (12 * PAGE_SIZE, PAGE_SIZE + 1), (-1, 1)]
)
def test_snapshot_does_not_answer_for_other_pages(offset: int, size: int) -> None:
    with pytest.raises(UsageError, match="not in the snapshot"):
        DirtySnapshot(10, PageBitmap(3)).is_dirty(offset, size)
