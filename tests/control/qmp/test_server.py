import asyncio
import contextlib
import gc
import os
import socket
import threading
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import msgspec
import pytest
from qemu.qmp import ExecuteError
from qemu.qmp import QMPClient as PeerClient

from dirtylog.control.qmp import Arguments, CommandRegistry, HandlerError, NoArguments, QMPServer, Scope, server
from dirtylog.control.qmp.connection import MAX_BACKLOG
from dirtylog.control.qmp.server import MAX_CLIENTS
from dirtylog.control.qmp.session import MAX_REQUEST
from dirtylog.errors import ClosedError, HostError, UsageError

SECONDS = 10.0

QUERY = b'{"execute": "query-version"}'

Connect = Callable[[], Any]
"""Connects one of conftest's raw clients."""


class Size(Arguments, frozen=True):
    size: int


class TestSession:
    def test_client_is_greeted_and_served(self, served: Any, connect: Connect) -> None:
        client = connect()
        assert client.read()["QMP"]["capabilities"] == []
        assert client.ask(QUERY)["error"]["class"] == "CommandNotFound"
        assert client.ask(b'{"execute": "qmp_capabilities", "id": 1}') == {"return": {}, "id": 1}
        assert client.ask(QUERY)["return"] == msgspec.to_builtins(served.registry.version)

    def test_client_that_came_before_the_start_is_served(self, path: Path, connect: Connect) -> None:
        with QMPServer(path, CommandRegistry()) as early:
            client = connect()
            early.start()
            client.negotiate()

    def test_each_client_negotiates_for_itself(self, served: Any, connect: Connect) -> None:
        connect().negotiate()
        client = connect()
        client.read()
        assert client.ask(QUERY)["error"]["class"] == "CommandNotFound"

    @pytest.mark.parametrize("junk", [b"{bad}\n", b"17\n", b"[]\n", b"{}", b'{"a": "\n', b"\xff\n", b"[" * 500 + b"\n"])
    def test_connection_survives_junk(self, served: Any, connect: Connect, junk: bytes) -> None:
        client = connect().negotiate()
        assert client.ask(junk)["error"]["class"] == "GenericError"
        assert "return" in client.ask(QUERY)

    def test_request_that_is_too_long_ends_the_connection(self, served: Any, connect: Connect) -> None:
        client = connect().negotiate()
        client.send(b'{"execute": "' + b"x" * MAX_REQUEST)
        assert "longer than" in client.read()["error"]["desc"]
        assert client.read() is None

    def test_client_that_only_stops_sending_gets_its_replies(self, served: Any, connect: Connect) -> None:
        client = connect()
        client.send(b'{"execute": "qmp_capabilities"}' + QUERY)
        client.socket.shutdown(socket.SHUT_WR)
        assert "QMP" in client.read()
        assert ["return" in client.read() for _ in range(2)] == [True, True]
        assert client.read() is None

    def test_client_that_leaves_within_a_request_disturbs_nobody(self, served: Any, connect: Connect) -> None:
        for part in (b"", b'{"execute"', QUERY * 100):
            leaver = connect().negotiate()
            leaver.send(part)
            leaver.close()
        assert "return" in connect().negotiate().ask(QUERY)
        assert not served.failures

    def test_reply_longer_than_the_socket_takes_arrives_whole(self, served: Any, connect: Connect) -> None:
        served.registry.add("long", Size, lambda arguments: "x" * arguments.size)
        client = connect().negotiate()
        assert len(client.ask(b'{"execute": "long", "arguments": {"size": 5000000}}')["return"]) == 5_000_000

    def test_replies_that_nobody_reads_hold_up_only_their_client(self, served: Any, connect: Connect) -> None:
        served.registry.add("long", Size, lambda arguments: "x" * arguments.size)
        lazy = connect().negotiate()
        lazy.send(b"".join(b'{"execute": "long", "id": %d, "arguments": {"size": 100000}}' % i for i in range(50)))
        assert "return" in connect().negotiate().ask(QUERY)
        assert [lazy.read()["id"] for _ in range(50)] == list(range(50))

    def test_client_too_many_is_told_so(self, served: Any, connect: Connect) -> None:
        clients = [connect().negotiate() for _ in range(MAX_CLIENTS)]
        refused = connect()
        assert f"{MAX_CLIENTS} clients" in refused.read()["error"]["desc"]
        assert refused.read() is None
        assert "return" in clients[0].ask(QUERY)


class TestCommands:
    def test_commands_of_all_clients_run_one_at_a_time(self, served: Any, connect: Connect) -> None:
        entered = threading.Lock()
        overlaps = []

        def alone(_: NoArguments) -> None:
            overlaps.append(not entered.acquire(blocking=False))
            for _turn in range(1000):  # gives other threads chances to come in
                os.sched_yield()
            entered.release()

        served.registry.add("alone", NoArguments, alone)
        clients = [connect().negotiate() for _ in range(3)]
        for client in clients:
            client.send(b'{"execute": "alone"}' * 5)
        for client in clients:
            assert [client.read() for _ in range(5)] == [{"return": {}}] * 5
        assert overlaps == [False] * 15

    def test_defect_in_a_handler_is_told_to_client_and_owner(self, served: Any, connect: Connect) -> None:
        served.registry.add("broken", NoArguments, lambda _: {}["missing"])  # type: ignore[index]
        client = connect().negotiate()
        assert "internal error" in client.ask(b'{"execute": "broken"}')["error"]["desc"]
        assert served.failed.wait(SECONDS)
        [failure] = served.failures
        assert isinstance(failure, HandlerError)
        assert isinstance(failure.__cause__, KeyError)
        assert served.server.failure is failure
        assert "return" in client.ask(QUERY)

    def test_refusal_by_a_handler_is_no_failure(self, served: Any, connect: Connect) -> None:
        def refuse(_: NoArguments) -> None:
            raise HostError("no", remedy="buy one")

        served.registry.add("refuse", NoArguments, refuse)
        reply = connect().negotiate().ask(b'{"execute": "refuse"}')
        assert reply == {"error": {"class": "GenericError", "desc": "no; buy one"}}
        assert served.server.failure is None

    def test_defect_after_the_reply_is_told_to_the_owner(self, served: Any, connect: Connect) -> None:
        def break_down() -> None:
            raise KeyError("missing")

        served.registry.add("late", NoArguments, lambda _: None, after_reply=break_down)
        assert connect().negotiate().ask(b'{"execute": "late"}') == {"return": {}}
        assert served.failed.wait(SECONDS)
        assert isinstance(served.failures[0].__cause__, KeyError)


class TestQuit:
    @pytest.mark.parametrize("attempt", range(10))
    def test_reply_is_sent_before_the_server_ends(self, path: Path, connect: Connect, attempt: int) -> None:
        ended = threading.Event()
        registry = CommandRegistry()
        registry.add("quit", NoArguments, lambda _: None, after_reply=ended.set)
        with QMPServer(path, registry) as quitting:
            quitting.start()
            client = connect().negotiate()
            client.send(b'{"execute": "quit"}')
            assert ended.wait(SECONDS)
            quitting.close()
            assert client.read() == {"return": {}}
            assert client.read() is None

    def test_client_that_does_not_wait_for_the_reply_is_obeyed(self, served: Any, connect: Connect) -> None:
        ended = threading.Event()
        served.registry.add("quit", NoArguments, lambda _: None, after_reply=ended.set)
        client = connect().negotiate()
        client.send(b'{"execute": "quit"}')
        client.close()
        assert ended.wait(SECONDS)

    def test_after_reply_may_close_the_server(self, served: Any, connect: Connect, path: Path) -> None:
        served.registry.add("quit", NoArguments, lambda _: None, after_reply=served.server.close)
        client = connect().negotiate()
        assert client.ask(b'{"execute": "quit"}') == {"return": {}}
        assert client.read() is None
        assert not path.exists()


class TestEvents:
    def test_event_has_name_data_and_time(self, served: Any, connect: Connect) -> None:
        client = connect().negotiate()
        served.server.emit("MIGRATION", {"status": "active"})
        event = client.read()
        timestamp = event.pop("timestamp")
        assert event == {"event": "MIGRATION", "data": {"status": "active"}}
        assert sorted(timestamp) == ["microseconds", "seconds"]

    def test_event_without_data_has_no_such_member(self, served: Any, connect: Connect) -> None:
        client = connect().negotiate()
        served.server.emit("STOP")
        assert sorted(client.read()) == ["event", "timestamp"]

    def test_data_may_be_a_struct(self, served: Any, connect: Connect) -> None:
        client = connect().negotiate()
        served.server.emit("SIZE", Size(size=3))
        assert client.read()["data"] == {"size": 3}

    def test_only_negotiated_clients_hear_of_events(self, served: Any, connect: Connect) -> None:
        silent, listening = connect(), connect().negotiate()
        silent.read()
        served.server.emit("STOP")
        assert listening.read()["event"] == "STOP"
        silent.send(b'{"execute": "qmp_capabilities"}')
        assert silent.read() == {"return": {}}

    def test_event_of_a_command_comes_before_its_reply(self, served: Any, connect: Connect) -> None:
        served.registry.add("stop", NoArguments, lambda _: served.server.emit("STOP"))
        client = connect().negotiate()
        assert client.ask(b'{"execute": "stop"}')["event"] == "STOP"
        assert client.read() == {"return": {}}

    def test_events_wait_for_a_client_that_reads_late(self, served: Any, connect: Connect) -> None:
        client = connect().negotiate()
        for number in range(200):
            served.server.emit("N", {"number": number, "filler": "x" * 4000})
        assert [client.read()["data"]["number"] for _ in range(200)] == list(range(200))

    def test_client_that_does_not_read_is_dropped_and_delays_nobody(self, served: Any, connect: Connect) -> None:
        stuck, reader = connect().negotiate(), connect().negotiate()
        sent = 3 * MAX_BACKLOG // 10_000
        for number in range(sent):
            served.server.emit("N", {"number": number, "filler": "x" * 10_000})
            assert reader.read()["data"]["number"] == number
        received = 0
        while len(stuck.socket.recv(1 << 16)) > 0:
            received += 1
        assert received
        assert "return" in reader.ask(QUERY)

    def test_client_that_is_still_reading_a_long_reply_is_not_dropped(self, served: Any, connect: Connect) -> None:
        asked = threading.Event()

        def answer(_: NoArguments) -> str:
            asked.set()
            return "x" * (3 * MAX_BACKLOG)

        served.registry.add("long", NoArguments, answer)
        client = connect().negotiate()
        client.send(b'{"execute": "long"}')
        assert asked.wait(SECONDS)
        assert client.socket.recv(1, socket.MSG_PEEK)  # some of the reply is here, and the rest waits
        served.server.emit("STOP")
        assert len(client.read()["return"]) == 3 * MAX_BACKLOG
        assert client.read()["event"] == "STOP"

    def test_event_with_no_client_is_lost(self, served: Any) -> None:
        served.server.emit("STOP")

    def test_event_after_close_is_lost(self, served: Any) -> None:
        served.server.close()
        served.server.emit("STOP")

    def test_events_of_many_threads_arrive_whole_and_in_their_order(self, served: Any, connect: Connect) -> None:
        client = connect().negotiate()

        def emit(name: str) -> None:
            for number in range(100):
                served.server.emit(name, {"number": number, "filler": "x" * 1000})

        threads = [threading.Thread(target=emit, args=(name,)) for name in "ABC"]
        for thread in threads:
            thread.start()
        events = [client.read() for _ in range(300)]
        for thread in threads:
            thread.join()
        for name in "ABC":
            assert [e["data"]["number"] for e in events if e["event"] == name] == list(range(100))


class TestScope:
    def test_what_a_client_leaves_behind_ends_with_it(self, served: Any, connect: Connect) -> None:
        ended = threading.Event()
        served.registry.add_scoped("leave", NoArguments, lambda _, scope: scope.callback(ended.set) and None)
        client, other = connect().negotiate(), connect().negotiate()
        assert client.ask(b'{"execute": "leave"}') == {"return": {}}
        other.close()
        assert "return" in client.ask(QUERY)
        assert not ended.is_set()
        client.close()
        assert ended.wait(SECONDS)

    def test_what_clients_leave_behind_ends_with_the_server(self, served: Any, connect: Connect) -> None:
        ended = threading.Event()
        served.registry.add_scoped("leave", NoArguments, lambda _, scope: scope.callback(ended.set) and None)
        assert connect().negotiate().ask(b'{"execute": "leave"}') == {"return": {}}
        served.server.close()
        assert ended.is_set()

    def test_end_that_fails_is_a_failure_of_the_server(self, served: Any, connect: Connect) -> None:
        ended: list[int] = []

        def leave(_: NoArguments, scope: Scope) -> None:
            scope.callback(ended.remove, 1)

        served.registry.add_scoped("leave", NoArguments, leave)
        client = connect().negotiate()
        client.ask(b'{"execute": "leave"}')
        client.close()
        assert served.failed.wait(SECONDS)
        (failure,) = served.failures
        assert isinstance(failure, HandlerError)
        assert isinstance(failure.__cause__, ValueError)


class TestClose:
    def test_close_hangs_up_and_leaves_nothing(self, path: Path, connect: Connect) -> None:
        gc.collect()
        files, threads = len(os.listdir("/proc/self/fd")), threading.active_count()
        closing = QMPServer(path, CommandRegistry())
        closing.start()
        clients = [connect().negotiate() for _ in range(5)]
        closing.close()
        closing.close()
        for client in clients:
            assert client.read() is None
            client.close()
        assert not path.exists()
        assert (len(os.listdir("/proc/self/fd")), threading.active_count()) == (files, threads)

    def test_close_without_start_removes_the_socket(self, path: Path) -> None:
        QMPServer(path, CommandRegistry()).close()
        assert not path.exists()

    def test_start_twice_is_refused(self, served: Any) -> None:
        with pytest.raises(UsageError, match="started already"):
            served.server.start()

    def test_start_after_close_is_refused(self, path: Path) -> None:
        closed = QMPServer(path, CommandRegistry())
        closed.close()
        with pytest.raises(ClosedError):
            closed.start()

    def test_path_of_a_live_server_is_refused(self, served: Any, path: Path) -> None:
        with pytest.raises(UsageError, match="already in use"):
            QMPServer(path, CommandRegistry())

    def test_command_under_way_is_still_answered(self, served: Any, connect: Connect) -> None:
        started, closing = threading.Event(), threading.Event()

        def wait(_: NoArguments) -> None:
            started.set()
            closing.wait(SECONDS)

        served.registry.add("wait", NoArguments, wait)
        client = connect().negotiate()
        client.send(b'{"execute": "wait"}' + QUERY)
        assert started.wait(SECONDS)
        closer = threading.Thread(target=served.server.close)
        closer.start()
        closing.set()
        assert client.read() == {"return": {}}
        closer.join()

    def test_command_that_does_not_end_is_a_failure(
        self, served: Any, connect: Connect, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(server, "_CLOSE_SECONDS", 0.01)
        started, release = threading.Event(), threading.Event()

        def hang(_: NoArguments) -> None:
            started.set()
            release.wait(SECONDS)

        served.registry.add("hang", NoArguments, hang)
        client = connect().negotiate()
        client.send(b'{"execute": "hang"}')
        assert started.wait(SECONDS)
        served.server.close()
        assert "still running" in str(served.server.failure)
        assert client.read() is None
        release.set()


def run(path: Path, body: Callable[[PeerClient], Awaitable[None]]) -> None:
    """Run a body with a connected client of the qemu.qmp package."""

    async def main() -> None:
        peer = PeerClient("peer")
        await peer.connect(str(path))
        try:
            await body(peer)
        finally:
            await peer.disconnect()

    asyncio.run(asyncio.wait_for(main(), SECONDS))


class TestWithQEMUsClient:
    def test_it_negotiates_and_executes(self, served: Any, path: Path) -> None:
        async def body(peer: PeerClient) -> None:
            assert peer.greeting is not None
            assert peer.greeting.QMP.capabilities == []
            assert await peer.execute("query-version") == msgspec.to_builtins(served.registry.version)
            commands = await peer.execute("query-commands")
            assert {"name": "query-version"} in commands  # type: ignore[operator]

        run(path, body)

    def test_it_sends_many_requests_at_once(self, served: Any, path: Path) -> None:
        served.registry.add("double", Size, lambda arguments: 2 * arguments.size)

        async def body(peer: PeerClient) -> None:
            results = await asyncio.gather(*(peer.execute("double", {"size": n}) for n in range(100)))
            assert results == [2 * n for n in range(100)]

        run(path, body)

    @pytest.mark.parametrize(
        ("command", "arguments", "error_class"),
        [
            ("nope", None, "CommandNotFound"),
            ("query-version", {"x": 1}, "GenericError"),
            ("qmp_capabilities", None, "CommandNotFound"),
        ],
    )
    def test_it_understands_errors(
        self, served: Any, path: Path, command: str, arguments: dict[str, object] | None, error_class: str
    ) -> None:
        async def body(peer: PeerClient) -> None:
            with pytest.raises(ExecuteError) as caught:
                await peer.execute(command, arguments)
            assert caught.value.error_class == error_class

        run(path, body)

    def test_it_hears_of_events(self, served: Any, path: Path) -> None:
        served.registry.add("stop", NoArguments, lambda _: served.server.emit("STOP"))

        async def body(peer: PeerClient) -> None:
            with peer.listener("STOP") as events:
                await peer.execute("stop")
                assert (await events.get())["event"] == "STOP"

        run(path, body)

    def test_it_gets_the_reply_to_quit(self, served: Any, path: Path) -> None:
        served.registry.add("quit", NoArguments, lambda _: None, after_reply=served.server.close)

        async def body(peer: PeerClient) -> None:
            assert await peer.execute("quit") == {}
            with contextlib.suppress(EOFError):  # how it tells that the server was the first to hang up
                await peer.disconnect()

        run(path, body)

    def test_several_of_them_work_at_once(self, served: Any, path: Path) -> None:
        async def body(peer: PeerClient) -> None:
            second = PeerClient("second")
            await second.connect(str(path))
            with peer.listener("STOP") as first_events, second.listener("STOP") as second_events:
                served.server.emit("STOP")
                await first_events.get()
                await second_events.get()
            await second.disconnect()

        run(path, body)
