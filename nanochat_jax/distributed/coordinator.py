"""The line between the processes of a run: a TCP connection of each to process 0, with a line of JSON for a message.

Process 0 receives the others (`receive_all`, `visit`), passes on what they say in rounds, and ends the run where one of
them fails, or is lost. Nothing that comes is executed; whoever is no process of the run is turned away.
"""

import contextlib
import ctypes
import json
import os
import select
import signal
import socket
import sys
import threading
import time
from collections.abc import Mapping
from typing import Any

from nanochat_jax.distributed.cluster import Place

START_SECONDS = float(os.environ.get("NANOCHAT_START_SECONDS", 300))  # that the processes wait for each other
LOST_AFTER = float(os.environ.get("NANOCHAT_LOST_SECONDS", 25))  # without a word from a process
BEAT = 1.0  # seconds between two words
LOST = 75  # exit code when another process was lost: sysexits' "try again", which --resume does
MOST = 1 << 24  # bytes of a line


class Peer:
    """A connection to another process, and when it was last heard."""

    def __init__(self, connection: socket.socket):
        connection.settimeout(LOST_AFTER)
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self.socket, self.pending, self.heard, self.closed = connection, b"", time.monotonic(), False
        self.lock = threading.Lock()

    def send(self, **message: Any) -> None:
        with self.lock, contextlib.suppress(OSError):  # who reads finds out that the other end is closed
            self.socket.sendall(json.dumps(message).encode() + b"\n")

    def receive(self) -> list[dict]:
        """Whole messages that have come, without waiting where `select` says so; `closed` after the last one."""
        try:
            data = self.socket.recv(1 << 16)
        except OSError:
            data = b""
        self.closed = not data
        self.heard = time.monotonic()
        *lines, self.pending = (self.pending + data).split(b"\n")
        try:
            messages = [json.loads(line) for line in lines]
        except ValueError:
            messages = [None]
        if len(self.pending) > MOST or not all(isinstance(message, dict) for message in messages):
            self.closed = True  # no process of ours
            return []
        return messages


class Line(threading.Thread):
    """Process 0's connections to all others, or another's to process 0, served by a thread of their own."""

    def __init__(self, place: Place, peers: dict[int, Peer], hosts: list[str], jax_port: int, door=None):
        super().__init__(name="line", daemon=True)
        self.place, self.peers, self.hosts, self.jax_port, self.door = place, peers, hosts, jax_port, door
        self.changed = threading.Condition()
        self.noticed, self.calls, self.stop_after, self.in_order = 0, 0, None, False
        self.told = 0  # by which process the signal was noticed
        self.interrupts = 0
        self.number, self.results, self.closing, self.silent = 0, {}, False, False
        self.rounds: dict[int, dict[int, tuple[str, Any]]] = {}
        self.places: dict[int, int | None] = {}  # process -> its calls of stop_here when it noticed the signal
        self.ending = threading.Lock()
        wake, self.wakened = socket.socketpair()
        wake.setblocking(False)
        self.wake = wake
        signal.set_wakeup_fd(wake.fileno(), warn_on_full_buffer=False)  # heard also while JAX keeps the main thread
        self.handlers = {s: signal.signal(s, lambda *_: None) for s in (signal.SIGTERM, signal.SIGINT)}
        if place.index:
            self._aborted = ctypes.CFUNCTYPE(None, ctypes.c_int)(self._on_abort)
            ctypes.CDLL(None).signal(int(signal.SIGABRT), self._aborted)

    # what the main thread asks for
    def exchange(self, what: str, value: Any) -> list[Any]:
        number, self.number = self.number, self.number + 1
        self._tell(round=number, what=what, value=value)
        with self.changed:
            self.changed.wait_for(lambda: number in self.results)
            return self.results.pop(number)

    def stop_here(self) -> bool:
        with self.changed:
            self.calls += 1
            if not self.noticed:
                return False
            self.changed.wait_for(lambda: self.stop_after is not None)
            return self.calls > self.stop_after

    def fail(self, sentence: str) -> None:
        """Tell the others why this process, which has said so itself, ends; and end."""
        self.silent = True
        self._tell(failed=" ".join(sentence.split())[:500])
        time.sleep(5)  # process 0 answers at once
        os._exit(1)

    # what the thread does
    def run(self) -> None:
        beat = 0.0
        while True:
            open_peers = {peer.socket: i for i, peer in self.peers.items() if not peer.closed}
            waiting = [*open_peers, self.wakened, *([self.door] if self.door else [])]
            for ready in select.select(waiting, [], [], BEAT / 2)[0]:
                if ready is self.wakened:
                    self._signalled(self.wakened.recv(1)[0])
                elif ready is self.door:
                    self._turn_away()
                else:
                    self._read(open_peers[ready])
            now = time.monotonic()
            if now - beat >= BEAT:
                beat = now
                for peer in self.peers.values():
                    peer.send()
            for i, peer in self.peers.items():
                if not peer.closed and now - peer.heard > LOST_AFTER:
                    self._lost(i, f"nothing was heard of it for {LOST_AFTER:.0f} seconds")

    def _read(self, i: int) -> None:
        for message in self.peers[i].receive():
            self._take(i, message)
        if self.peers[i].closed:
            self._lost(i, "its connection is closed")

    def _tell(self, **message: Any) -> None:
        """Process 0 hears this."""
        if self.place.index:
            self.peers[0].send(**message)
        else:
            self._take(0, message)

    def _tell_all(self, **message: Any) -> None:
        for peer in self.peers.values():
            peer.send(**message)
        self._hear(message)

    def _take(self, i: int, message: dict) -> None:
        """A message of process i, on process 0; on the others one of process 0."""
        if self.place.index:
            return self._hear(message)
        if "round" in message:
            with self.changed:
                said = self.rounds.setdefault(message["round"], {})
                said[i] = message["what"], message["value"]
                if len(said) < self.place.count:
                    return None
                del self.rounds[message["round"]]
            for k in range(1, self.place.count):
                if said[k][0] != said[0][0]:
                    self._end(
                        f"process {k} on {self.hosts[k]} is at {said[k][0]!r} while process 0 is at {said[0][0]!r}"
                    )
            values = [said[k][1] for k in range(self.place.count)]
            self._tell_all(results=message["round"], what=said[0][0], values=values)
        elif "signal" in message and not self.noticed:
            self.told = i
            self._tell_all(stop=message["signal"])
        elif "at" in message:
            with self.changed:
                self.places[i] = message["at"]
                if len(self.places) < self.place.count:
                    return None
            if None in self.places.values():
                code = 128 + self.noticed
                self._end(f"process {self.told} on {self.hosts[self.told]} got signal {self.noticed}: all stop", code)
            self._tell_all(stop_after=max(self.places.values()))
        elif "failed" in message:
            self._end(f"process {i} on {self.hosts[i]} has stopped: {message['failed']}")
        return None

    def _hear(self, message: dict) -> None:
        """What process 0 tells all."""
        if "results" in message:
            with self.changed:
                self.closing |= message["what"] == "end"
                self.results[message["results"]] = message["values"]
                self.changed.notify_all()
        elif "stop" in message:
            with self.changed:
                self.noticed = message["stop"]
                at = self.calls if self.in_order else None
            self._tell(at=at)
        elif "stop_after" in message:
            with self.changed:
                self.stop_after = message["stop_after"]
                self.changed.notify_all()
        elif "end" in message:
            self._exit(message["end"], message["code"])

    def _signalled(self, number: int) -> None:
        self.interrupts += number == signal.SIGINT
        if self.interrupts > 1:
            self._tell(failed="it was interrupted twice")
        elif number in self.handlers:
            self._tell(signal=number)

    def _lost(self, i: int, how: str) -> None:
        self.peers[i].closed = True
        if not self.closing:
            sentence = f"process {i} on {self.hosts[i]} is lost ({how}); start all again with --resume"
            self._exit(sentence, LOST) if self.place.index else self._end(sentence, LOST)

    def _end(self, sentence: str, code: int = 1) -> None:
        """Process 0 ends the run; it goes last, as the others' JAX does not survive it."""
        if not self.ending.acquire(blocking=False):
            time.sleep(60)  # another thread is at it
        self.closing = True
        for peer in self.peers.values():
            peer.send(end=sentence, code=code)
        left, deadline = {peer.socket for peer in self.peers.values() if not peer.closed}, time.monotonic() + 3
        while left and time.monotonic() < deadline:
            for ready in select.select([*left], [], [], 0.1)[0]:
                with contextlib.suppress(OSError):
                    if ready.recv(1 << 16):
                        continue
                left.remove(ready)
        self._say_and_exit(sentence, code)

    def _exit(self, sentence: str, code: int) -> None:
        if not self.ending.acquire(blocking=False):
            time.sleep(60)
        self._say_and_exit(sentence, code)

    def _say_and_exit(self, sentence: str, code: int) -> None:
        if not self.silent:
            with contextlib.suppress(Exception):
                sys.stdout.flush()
            os.write(2, f"\nerror: {sentence}\n".encode())
        os._exit(code)

    def _turn_away(self) -> None:
        with contextlib.suppress(OSError):
            visitor, _ = self.door.accept()
            Peer(visitor).send(refused=f"the {self.place.count} processes of this run have begun already")
            visitor.close()

    def _on_abort(self, _: int) -> None:
        """JAX aborts every process as soon as process 0 is gone: then say so, instead of SIGABRT. Any other abort goes
        on when this returns."""
        sock = self.peers[0].socket
        try:
            gone = bool(select.select([sock], [], [], 1)[0]) and not sock.recv(1, socket.MSG_PEEK)
        except OSError:
            gone = True
        if gone:
            self._lost(0, "its connection is closed")


def receive_all(place: Place, facts: dict[str, str]) -> Line:
    """Process 0: listen until all others have come with the same facts."""
    deadline = time.monotonic() + START_SECONDS
    while True:
        try:
            door = _listen(place, place.port)
            break
        except OSError as e:  # as a rule a run that is ending
            if time.monotonic() > min(deadline, deadline - START_SECONDS + 30):
                raise ValueError(f"process 0 cannot listen at {place.coordinator} ({e}): choose another port") from e
            time.sleep(0.5)
    visitors: dict[socket.socket, Peer] = {}
    peers: dict[int, Peer] = {}
    hosts = {0: socket.gethostname()}
    faults: list[str] = []

    def end(sentence):
        for peer in [*peers.values(), *visitors.values()]:
            peer.send(refused=sentence)
        raise ValueError(sentence)

    while len(peers) + 1 < place.count or faults:
        left = deadline - time.monotonic()
        if left <= 0 or (faults and len(peers) + 1 == place.count):
            missing = [str(i) for i in range(1, place.count) if i not in hosts]
            absent = (
                f"process {', '.join(missing)} of {place.count} did not come to {place.coordinator} within "
                f"{START_SECONDS:.0f} seconds: start all of them with the same --coordinator and --num-processes"
            )
            end("; ".join(faults) or absent)
        for ready in select.select([door, *visitors], [], [], min(left, 1.0))[0]:
            if ready is door:
                visitor, _ = door.accept()
                visitors[visitor] = Peer(visitor)
                continue
            messages = visitors[ready].receive()
            if not messages:
                if visitors[ready].closed:
                    visitors.pop(ready).socket.close()
                continue
            peer, hello = visitors.pop(ready), messages[0]
            i, host = hello.get("process"), str(hello.get("host"))
            if not isinstance(i, int) or not isinstance(hello.get("facts"), dict) or not i > 0:
                peer.socket.close()
            elif i >= place.count or i in peers:
                why = f"process {i} on {host} is refused: "
                why += (
                    f"process {i} on {hosts[i]} has come already" if i in peers else f"there are {place.count} of them"
                )
                peer.send(refused=why)
                peer.socket.close()
            else:
                peers[i], hosts[i] = peer, host
                if fault := difference(i, host, hello["facts"], facts):
                    faults.append(fault)
                    deadline = min(deadline, time.monotonic() + 5)  # so that those who come meanwhile hear of it too
    with _listen(place, 0) as probe:
        jax_port = probe.getsockname()[1]
    ordered = [hosts[i] for i in range(place.count)]
    for peer in peers.values():
        peer.send(welcome=ordered, jax_port=jax_port)
    return Line(place, peers, ordered, jax_port, door)


def _listen(place: Place, port: int) -> socket.socket:
    """On all addresses of the machine, or on loopback alone; port 0: any that is free."""
    how = {"backlog": max(128, place.count)}
    if place.loopback:
        return socket.create_server(("127.0.0.1", port), **how)
    if socket.has_dualstack_ipv6():
        return socket.create_server(("", port), family=socket.AF_INET6, dualstack_ipv6=True, **how)
    return socket.create_server(("", port), **how)


def visit(place: Place, facts: dict[str, str]) -> Line:
    """Another process: come to process 0 and be taken."""
    deadline = time.monotonic() + START_SECONDS
    while time.monotonic() < deadline:
        try:
            peer = Peer(socket.create_connection((place.host, place.port), timeout=min(5.0, START_SECONDS)))
        except OSError:
            time.sleep(0.2)
            continue
        peer.send(process=place.index, host=socket.gethostname(), facts=facts)
        while not peer.closed and time.monotonic() < deadline + 10:  # process 0 says why, if not all come
            if not select.select([peer.socket], [], [], 0.5)[0]:
                continue
            for message in peer.receive():
                if "refused" in message:
                    raise ValueError(str(message["refused"]))
                if "welcome" in message:
                    return Line(place, {0: peer}, message["welcome"], message["jax_port"])
        time.sleep(0.5)
    raise ValueError(
        f"process {place.index} cannot reach process 0 at {place.coordinator} within {START_SECONDS:.0f} seconds: "
        "start all processes with the same --coordinator, which is a name of process 0's machine"
    )


def difference(number: int, host: str, other: Mapping[str, str], zero: Mapping[str, str]) -> str:
    """The sentence about a process whose facts are not those of process 0; empty where they are."""
    differing = [name for name in (zero | other) if other.get(name) != zero.get(name)]
    shown = [
        f"{name} is {other.get(name, 'unknown'):.80} instead of {zero.get(name, 'unknown'):.80}" for name in differing
    ]
    return f"process {number} on {host} is refused, as it differs from process 0: {', '.join(shown)}" if shown else ""
