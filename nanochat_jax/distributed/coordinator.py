"""The TCP connections over which the processes of a run talk to process 0, independently of JAX.

Process 0 collects the values of all processes and sends them to all, and ends the run when a process fails or is lost.
A message is one line of JSON, an object that its first key names; nothing in it is executed. An empty one, sent every
second both ways, shows that the sender is alive.

Requests go to process 0, which handles its own ones without a connection:
    exchange, what, value  the process's value in this exchange, a number or "stop"
    signal                 the process got the signal of this number
    failed, code           the process ends, for this reason; code: the exit code of all, default 1
Orders go from process 0 to all:
    results, what, values  the values of all processes in this exchange
    stop                   a process got the signal of this number: exchange your calls of stop_here so far as "stop",
                           null outside stopping_in_order; the run stops after the largest, or at once where one is null
    end, code              print this sentence and exit with this code
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
from collections.abc import Iterator
from typing import Any

from nanochat_jax.distributed.cluster import ClusterInfo

LOST_SECONDS = float(os.environ.get("NANOCHAT_LOST_SECONDS", 25))  # a process that is silent for so long is lost
HEARTBEAT_SECONDS = 1.0
LOST_EXIT_CODE = 75  # another process was lost: "try again" in sysexits.h, which is to start the run with --resume
MAX_MESSAGE_BYTES = 1 << 24
STOP_SIGNALS = (signal.SIGTERM, signal.SIGINT)


class Peer:
    """A connection to another process."""

    def __init__(self, connection: socket.socket):
        connection.settimeout(LOST_SECONDS)
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self.socket = connection
        self.closed = False
        self.last_heard = time.monotonic()
        self._unfinished = b""  # the beginning of a message whose end has not arrived yet
        self._sending = threading.Lock()

    def send(self, **message: Any) -> None:
        """Send a message of JSON values; nothing where the connection is closed."""
        with self._sending, contextlib.suppress(OSError):  # `receive` finds out that a connection is closed
            self.socket.sendall(json.dumps(message).encode() + b"\n")

    def receive(self) -> list[dict]:
        """The messages that have arrived completely; `closed` is set where no more will come. It does not block after
        `select` has found something to read."""
        try:
            data = self.socket.recv(1 << 16)
        except OSError:
            data = b""
        self.closed = not data
        self.last_heard = time.monotonic()
        *lines, self._unfinished = (self._unfinished + data).split(b"\n")
        try:
            messages = [json.loads(line) for line in lines]
        except ValueError:
            messages = [None]
        if len(self._unfinished) > MAX_MESSAGE_BYTES or not all(isinstance(message, dict) for message in messages):
            self.closed = True  # this is no process of a run
            return []
        return messages


class Coordinator(threading.Thread):
    """A process's connections, on process 0 to all others and else to process 0, and the thread that serves them.

    The main thread calls `fail`, and `exchange`, `stopping_in_order` and `stop_here`, which `processes` describes.
    """

    def __init__(self, cluster: ClusterInfo, peers: dict[int, Peer], hosts: list[str], jax_port: int, listener=None):
        super().__init__(name="coordinator", daemon=True)
        self.cluster = cluster
        self.hosts = hosts  # host name of each process
        self.jax_port = jax_port  # on process 0's host, for jax.distributed
        self.signal_number = 0  # the signal that one of the processes got; 0: none
        self._peers = peers  # process -> connection
        self._listener = listener  # process 0: the socket at which latecomers are turned away
        self._changed = threading.Condition()  # guards what both threads use
        self._exchange_number = 0  # of the next exchange
        self._parts: dict[int | str, dict[int, tuple[str, Any]]] = {}  # process 0: exchange -> process -> (what, value)
        self._results: dict[int | str, list] = {}  # exchange -> values of all processes, which the main thread awaits
        self._in_order = False  # a signal stops the run in stop_here, and not at once
        self._stop_calls = 0  # calls of stop_here so far
        self._signalled = 0  # process 0: the process that got the signal
        self._interrupts = 0  # SIGINTs so far
        self._at_end = False  # all processes have reached their end, so that a closed connection is no loss
        self._silent = False  # this process has printed why it ends
        self._exiting = threading.Lock()  # held by the thread that ends this process
        # A signal's number arrives at a socket, so that this thread reads it even while JAX blocks the main thread.
        self._signals, self._signals_in = socket.socketpair()
        self._signals_in.setblocking(False)
        signal.set_wakeup_fd(self._signals_in.fileno(), warn_on_full_buffer=False)
        for number in STOP_SIGNALS:
            signal.signal(number, lambda *_: None)
        if cluster.process_index:
            self._abort_handler = ctypes.CFUNCTYPE(None, ctypes.c_int)(self._on_abort)
            ctypes.CDLL(None).signal(int(signal.SIGABRT), self._abort_handler)

    def exchange(self, what: str, value: Any) -> list[Any]:
        """See `processes.exchange`."""
        number, self._exchange_number = self._exchange_number, self._exchange_number + 1
        self._request(exchange=number, what=what, value=value)
        with self._changed:
            self._changed.wait_for(lambda: number in self._results)
            return self._results.pop(number)

    @contextlib.contextmanager
    def stopping_in_order(self) -> Iterator[None]:
        """See `processes.stopping_in_order`."""
        self._in_order = True
        yield
        # A signal must not end the processes that are still inside, so all wait for each other here.
        self.signal_number = max(self.exchange("the end of the loop", self.signal_number))
        self._in_order = False

    def stop_here(self) -> bool:
        """See `processes.stop_here`."""
        with self._changed:
            self._stop_calls += 1
            if not self.signal_number:
                return False
            self._changed.wait_for(lambda: "stop" in self._results)
            return self._stop_calls > max(self._results["stop"])

    def fail(self, reason: str) -> None:
        """Exit for a reason that this process has printed already, which ends the others too."""
        self._silent = True
        self._request(failed=" ".join(reason.split())[:500])
        time.sleep(5)  # process 0 orders the end at once
        os._exit(1)

    def run(self) -> None:
        """The thread: receive what the other processes send, and find out which of them is lost."""
        last_beat = 0.0
        while True:
            processes = {peer.socket: i for i, peer in self._peers.items() if not peer.closed}
            sockets = [*processes, self._signals, *([self._listener] if self._listener else [])]
            for ready in select.select(sockets, [], [], HEARTBEAT_SECONDS / 2)[0]:
                if ready is self._signals:
                    self._on_signal(ready.recv(1)[0])
                elif ready is self._listener:
                    with contextlib.suppress(OSError):
                        latecomer = Peer(self._listener.accept()[0])
                        latecomer.send(refused=f"the {len(self.hosts)} processes of this run have begun already")
                        latecomer.socket.close()
                else:
                    self._receive(processes[ready])
            now = time.monotonic()
            if now - last_beat >= HEARTBEAT_SECONDS:
                last_beat = now
                for peer in self._peers.values():
                    peer.send()
            for i, peer in self._peers.items():
                if not peer.closed and now - peer.last_heard > LOST_SECONDS:
                    self._on_loss(i, f"nothing was heard of it for {LOST_SECONDS:.0f} seconds")

    def _receive(self, i: int) -> None:
        for message in self._peers[i].receive():
            if self.cluster.process_index:
                self._follow_order(message)
            else:
                self._handle_request(i, message)
        if self._peers[i].closed:
            self._on_loss(i, "its connection is closed")

    def _request(self, **message: Any) -> None:
        if self.cluster.process_index:
            self._peers[0].send(**message)
        else:
            self._handle_request(0, message)

    def _order(self, **message: Any) -> None:
        for peer in self._peers.values():
            peer.send(**message)
        self._follow_order(message)

    def _handle_request(self, sender: int, message: dict) -> None:
        match message:
            case {"exchange": key, "what": what, "value": value}:
                with self._changed:
                    parts = self._parts.setdefault(key, {})
                    parts[sender] = what, value
                    if len(parts) < self.cluster.process_count:
                        return
                    del self._parts[key]
                for i, (name, _) in sorted(parts.items()):
                    if name != parts[0][0]:
                        self._exit(f"{self._process_name(i)} is at {name!r} while process 0 is at {parts[0][0]!r}")
                values = [value for _, (_, value) in sorted(parts.items())]
                if key == "stop" and None in values:
                    sentence = f"{self._process_name(self._signalled)} got signal {self.signal_number}: all stop"
                    self._exit(sentence, 128 + self.signal_number)
                self._order(results=key, what=what, values=values)
            case {"signal": number} if not self.signal_number:
                self._signalled = sender
                self._order(stop=number)
            case {"failed": reason, **more}:
                self._exit(f"{self._process_name(sender)} has stopped: {reason}", more.get("code", 1))

    def _follow_order(self, message: dict) -> None:
        match message:
            case {"results": key, "what": what, "values": values}:
                with self._changed:
                    self._at_end |= what == "end"
                    self._results[key] = values
                    self._changed.notify_all()
            case {"stop": number}:
                with self._changed:
                    self.signal_number = number
                    calls = self._stop_calls if self._in_order else None
                if self._in_order and not self.cluster.process_index:
                    os.write(2, b"\nStopping, and saving what is not saved yet\n")
                self._request(exchange="stop", what="stop", value=calls)
            case {"end": sentence, "code": code}:
                self._exit(sentence, code)

    def _on_signal(self, number: int) -> None:
        self._interrupts += number == signal.SIGINT
        if self._interrupts > 1:
            self._request(failed="it was interrupted twice, steps since the last checkpoint are lost", code=130)
        elif number in STOP_SIGNALS:
            self._request(signal=number)

    def _on_loss(self, i: int, how: str) -> None:
        self._peers[i].closed = True
        if not self._at_end:
            self._exit(f"{self._process_name(i)} is lost ({how}); start all again with --resume", LOST_EXIT_CODE)

    def _on_abort(self, _: int) -> None:
        """JAX aborts every process as soon as process 0 is gone: report that loss instead. An abort for another reason
        takes its course when this returns."""
        connection = self._peers[0].socket
        try:
            gone = bool(select.select([connection], [], [], 1)[0]) and not connection.recv(1, socket.MSG_PEEK)
        except OSError:
            gone = True
        if gone:
            self._on_loss(0, "its connection is closed")

    def _process_name(self, i: int) -> str:
        return f"process {i} on {self.hosts[i]}"

    def _exit(self, sentence: str, code: int = 1) -> None:
        """End this process; process 0 ends all, and itself last, because JAX aborts the others without it."""
        if not self._exiting.acquire(blocking=False):
            time.sleep(60)  # the other thread ends the process meanwhile
        if not self.cluster.process_index:
            waiting, deadline = {peer.socket for peer in self._peers.values() if not peer.closed}, time.monotonic() + 3
            for peer in self._peers.values():
                peer.send(end=sentence, code=code)
            while waiting and time.monotonic() < deadline:
                for ready in select.select([*waiting], [], [], 0.1)[0]:
                    with contextlib.suppress(OSError):
                        if ready.recv(1 << 16):
                            continue
                    waiting.remove(ready)
        if not self._silent:
            with contextlib.suppress(Exception):
                sys.stdout.flush()
            os.write(2, f"\nerror: {sentence}\n".encode())
        os._exit(code)
