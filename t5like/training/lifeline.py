"""Who is alive: each process holds a TCP connection to process 0, and hears why a run must end.

A process that dies closes its connection at once, whatever its threads hang in; of a machine that
goes away the kernels find out by keep-alive probes in half a minute. jax's own heartbeats take 100
seconds, end in a C++ abort, and say nothing where collectives hang. The connections also carry the
agreements that processes come to in the background: at which of their checks all of them stop
(see `Agreement`).
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import secrets
import selectors
import socket
import sys
import threading
import time
from collections.abc import Callable
from typing import Any

# Stopped in a way that a restart cures.
RESTART = 75
# Seconds: between looks at what a signal handler has set; until the processes whose end is certain
# are gone; until a process that may be about to say the same thing itself is ended.
_POLL, _GONE, _GRACE = 0.1, 10.0, 3.0
# Probes after 10 idle seconds, every 5 of them, 3 unanswered ones: a machine is gone in 25 s.
_KEEP_ALIVE = {"TCP_KEEPIDLE": 10, "TCP_KEEPINTVL": 5, "TCP_KEEPCNT": 3, "TCP_USER_TIMEOUT": 25_000}


class _Channel:
    """JSON lines over a socket."""

    def __init__(self, connection: socket.socket):
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        for name, value in _KEEP_ALIVE.items():
            if hasattr(socket, name):  # Not every system has all of them.
                connection.setsockopt(socket.IPPROTO_TCP, getattr(socket, name), value)
        self.socket, self._lock, self._rest = connection, threading.Lock(), b""

    def send(self, **message: Any) -> None:
        """Sends; of a connection that is gone, reading finds out."""
        with self._lock, contextlib.suppress(OSError):
            self.socket.sendall(json.dumps(message).encode() + b"\n")

    def receive(self) -> list[dict[str, Any]] | None:
        """The whole messages that have arrived; None where the connection is gone."""
        try:
            data = self.socket.recv(1 << 16)
        except OSError:
            data = b""
        if not data:
            return None
        *lines, self._rest = (self._rest + data).split(b"\n")
        try:
            return [dict(json.loads(line)) for line in lines]
        except (ValueError, TypeError):  # Not one of ours.
            return None


@dataclasses.dataclass
class _Peer:
    """A process as process 0 sees it."""

    channel: _Channel
    process: int | None = None
    host: str = ""
    leaving: bool = False


@dataclasses.dataclass
class _Round:
    """An agreement under way: what each process has answered."""

    number: int
    counts: dict[int, int] = dataclasses.field(default_factory=dict)
    settled: bool = False


class Hub(threading.Thread):
    """Process 0's side of all connections.

    Attributes:
      port: where it listens.
      token: what a connection must show first.
      others_gone: set while no other process is connected.
    """

    def __init__(self, count: int):
        super().__init__(name="lifeline hub", daemon=True)
        self.token, self.others_gone = secrets.token_hex(16), threading.Event()
        dual = socket.has_dualstack_ipv6()
        family = socket.AF_INET6 if dual else socket.AF_INET
        self._server = socket.create_server(
            ("", 0), family=family, dualstack_ipv6=dual, backlog=count
        )
        self.port = self._server.getsockname()[1]
        self._peers: dict[int, _Peer] = {}
        self._count, self._waited_for, self._ended = count, set(range(count)), False
        self._rounds: dict[str, _Round] = {}
        self._selector = selectors.DefaultSelector()
        self._selector.register(self._server, selectors.EVENT_READ)

    def run(self) -> None:
        while True:
            for key, _ in self._selector.select():
                if key.fileobj is self._server:
                    with contextlib.suppress(OSError):  # Gone again before it was taken.
                        peer = _Peer(_Channel(self._server.accept()[0]))
                        self._selector.register(peer.channel.socket, selectors.EVENT_READ, peer)
                else:
                    self._hear(key.data)

    def _hear(self, peer: _Peer) -> None:
        messages = peer.channel.receive()
        for message in messages if messages is not None else [{"is": "gone"}]:
            if peer.process is None and message.get("token") != self.token:
                self._drop(peer)
                return
            match message.pop("is"):
                case "gone":
                    self._drop(peer)
                case "hello":
                    peer.process, peer.host = message["process"], message["host"]
                    self._peers[peer.process] = peer
                    self._ask_late(peer)
                case "leave":
                    peer.leaving = True
                case "failed":
                    self._end(peer, message["line"], message["status"])
                case "propose":
                    self._open(message["kind"])
                case "count":
                    self._take(peer.process, **message)

    def _drop(self, peer: _Peer) -> None:
        self._selector.unregister(peer.channel.socket)
        peer.channel.socket.close()
        if peer.process is None:
            return
        del self._peers[peer.process]
        self._waited_for.discard(peer.process)
        if not peer.leaving:
            line = _lost(peer.process, self._count, peer.host)
            self._end(peer, line, RESTART, lost=True)
        for kind in list(self._rounds):
            self._close(kind)
        if set(self._peers) <= {0}:
            self.others_gone.set()

    def _end(self, peer: _Peer, line: str, status: int, lost: bool = False) -> None:
        """The first reason is the one that all hear."""
        if not self._ended:
            self._ended = True
            who = {"is": "end", "of": peer.process, "host": peer.host}
            self._tell(**who, line=line, status=status, lost=lost)

    def _open(self, kind: str) -> None:
        if kind == "stop" and kind in self._rounds:
            return  # Several processes were asked to stop; once is enough.
        number = self._rounds[kind].number + 1 if kind in self._rounds else 1
        self._rounds[kind] = _Round(number)
        self._tell(**{"is": "ask"}, kind=kind, number=number)

    def _ask_late(self, peer: _Peer) -> None:
        """Asks a process that connected after the others were asked."""
        for kind, under_way in self._rounds.items():
            if not under_way.settled:
                peer.channel.send(**{"is": "ask"}, kind=kind, number=under_way.number)

    def _take(self, process: int, kind: str, number: int, count: int) -> None:
        if number == self._rounds[kind].number:
            self._rounds[kind].counts[process] = count
            self._close(kind)

    def _close(self, kind: str) -> None:
        """Sets the check once all that are left have said how many they have made."""
        under_way = self._rounds[kind]
        counts = under_way.counts
        if counts and not under_way.settled and self._waited_for <= set(counts):
            under_way.settled = True
            self._tell(**{"is": "at"}, kind=kind, check=max(counts.values()) + 1)

    def _tell(self, **message: Any) -> None:
        for peer in self._peers.values():
            peer.channel.send(**message)


class Agreement:
    """A point that all processes pass together, though only one of them wants it.

    Processes make the same checks in the same order, but not at the same time. One proposes;
    all say how many checks they have made, and make no other until they have heard the highest
    number: the check after that is the agreed one.
    """

    def __init__(self, kind: str, send: Callable[..., None]):
        self._kind, self._send = kind, send
        self._condition = threading.Condition()
        self._checks, self._asked, self._agreed = 0, False, set()

    def check(self) -> bool:
        """Whether this is the agreed check; made equally often by all processes."""
        with self._condition:
            # Whoever is waited for may be waiting for this process's devices, not for its host.
            self._condition.wait_for(lambda: not self._asked)
            self._checks += 1
            reached = self._checks in self._agreed
            self._agreed.discard(self._checks)
            return reached

    def propose(self) -> None:
        """Asks for a check that all pass together."""
        self._send(**{"is": "propose"}, kind=self._kind)

    def answer(self, number: int) -> None:
        """Says how many checks were made; the next one waits for `settle`."""
        with self._condition:
            self._asked = True
            count = max(self._checks, *self._agreed, 0)
        self._send(**{"is": "count"}, kind=self._kind, number=number, count=count)

    def settle(self, check: int) -> None:
        """Hears the agreed check."""
        with self._condition:
            self._asked = False
            self._agreed.add(check)
            self._condition.notify_all()


class Lifeline(threading.Thread):
    """This process's connection to process 0; ends the process when the run must end.

    Args:
      address: (host, port) of the hub.
      token: the hub's.
      process, count: this process and how many there are.
      first_host: what process 0's host is called.
      hub: in process 0.

    Raises:
      OSError: process 0 cannot be reached.
    """

    def __init__(
        self,
        address: tuple[str, int],
        token: str,
        process: int,
        count: int,
        first_host: str,
        hub: Hub | None,
    ):
        super().__init__(name="lifeline", daemon=True)
        self._channel = _Channel(socket.create_connection(address, timeout=60))
        self._channel.socket.settimeout(None)
        self._process, self._count, self._hub = process, count, hub
        self._first_host = first_host
        self._leaving, self._heard, self._end_heard = False, threading.Event(), threading.Event()
        self.agreements = {kind: Agreement(kind, self._channel.send) for kind in ("stop", "save")}
        # Kinds to propose, set by signal handlers, which must take no lock and add no key.
        self.wanted = dict.fromkeys(self.agreements, False)
        host = socket.gethostname()
        self._channel.send(**{"is": "hello"}, process=process, host=host, token=token)

    def run(self) -> None:
        with selectors.DefaultSelector() as selector:
            selector.register(self._channel.socket, selectors.EVENT_READ)
            while True:
                for kind in [kind for kind, wanted in self.wanted.items() if wanted]:
                    self.wanted[kind] = False
                    self.agreements[kind].propose()
                if not selector.select(_POLL):
                    continue
                messages = self._channel.receive()
                if messages is None:
                    if self._leaving:
                        return
                    self._end(_lost(0, self._count, self._first_host), RESTART)
                for message in messages:
                    self._hear(message)

    def _hear(self, message: dict[str, Any]) -> None:
        match message["is"]:
            case "ask":
                self.agreements[message["kind"]].answer(message["number"])
            case "at":
                self.agreements[message["kind"]].settle(message["check"])
            case "end" if message["of"] == self._process:
                self._heard.set()
            case "end" if message["lost"]:
                self._end(message["line"], message["status"])
            case "end":
                # Whoever meets the same error says so itself.
                threading.Thread(target=self._end_later, args=(message,), daemon=True).start()

    def _end_later(self, message: dict[str, Any]) -> None:
        self._end_heard.set()
        time.sleep(_GRACE)
        name = _name(message["of"], self._count, message["host"])
        self._end(f"{name} ended: {message['line']}", message["status"])

    def _end(self, line: str, status: int) -> None:
        self._end_heard.set()
        end_now(line, status, self._wait_for_others)

    def _wait_for_others(self) -> None:
        """Process 0 goes last: with it goes jax's coordinator, at which the others would abort."""
        if self._hub is not None:
            self._hub.others_gone.wait(_GONE)

    def fail(self, line: str, status: int) -> None:
        """Tells all processes that this one ends in an error, and why."""
        self._channel.send(**{"is": "failed"}, line=line, status=status)
        self._heard.wait(2)
        self._wait_for_others()

    def leave(self) -> None:
        """Says that this process ends as it should."""
        self._leaving = True
        self._channel.send(**{"is": "leave"})

    def wait_for_the_end(self, seconds: float) -> None:
        """Gives the reason for a failed collective time to arrive; it then ends the process."""
        if self._end_heard.wait(seconds):
            time.sleep(_GONE + _GRACE + 5)


_ending = threading.Lock()


def end_now(line: str, status: int, before: Callable[[], None] = lambda: None) -> None:
    """Prints a line and ends the process, whatever its other threads are doing; only once."""
    with _ending:
        # A progress bar hides the cursor.
        shown = "\x1b[?25h\n" if sys.stderr.isatty() else ""
        with contextlib.suppress(OSError, ValueError):  # Nobody reads, or it is closed.
            print(f"{shown}error: {' '.join(line.split())}", file=sys.stderr, flush=True)
        before()
        with contextlib.suppress(OSError, ValueError):
            sys.stdout.flush()
        os._exit(status)


def _name(process: int, count: int, host: str) -> str:
    return f"process {process} of {count}" + (f" (on {host})" if host else "")


def _lost(process: int, count: int, host: str) -> str:
    return (
        f"{_name(process, count, host)} was lost: it was killed, or its machine went away; run the "
        "same command again in all processes to go on from the last checkpoint"
    )
