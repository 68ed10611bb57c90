"""How the processes of a run meet: each of the others connects to process 0, which compares what must be equal on all.

A process first sends {process, host, facts}. When all have come, process 0 answers {welcome, jax_port} with the names
of all hosts, and the run begins; it answers {refused} with the reason where the run, or this process in it, cannot
begin. Whoever connects and is no process of the run is turned away.
"""

import os
import select
import socket
import time
from collections.abc import Mapping

from nanochat_jax.distributed.cluster import ClusterInfo
from nanochat_jax.distributed.coordinator import Coordinator, Peer

START_SECONDS = float(os.environ.get("NANOCHAT_START_SECONDS", 300))  # how long the processes wait for each other


def accept_processes(cluster: ClusterInfo, facts: dict[str, str]) -> Coordinator:
    """On process 0: wait until all others have come. ValueError, on all: some did not come within START_SECONDS, or one
    of them has other facts than process 0."""
    deadline = time.monotonic() + START_SECONDS
    while True:
        try:
            listener = _listen(cluster, cluster.port)
            break
        except OSError as e:  # in most cases the port of a run that is just ending
            if time.monotonic() > min(deadline, deadline - START_SECONDS + 30):
                sentence = f"process 0 cannot listen at {cluster.coordinator} ({e}): choose another port"
                raise ValueError(sentence) from e
            time.sleep(0.5)
    strangers: dict[socket.socket, Peer] = {}  # connections that have not said yet which process they are
    peers: dict[int, Peer] = {}
    hosts = {0: socket.gethostname()}
    faults: list[str] = []
    while len(hosts) < cluster.process_count and (left := deadline - time.monotonic()) > 0:
        for ready in select.select([listener, *strangers], [], [], min(left, 1.0))[0]:
            if ready is listener:
                connection, _ = listener.accept()
                strangers[connection] = Peer(connection)
                continue
            messages = strangers[ready].receive()
            if not messages and not strangers[ready].closed:
                continue
            peer, hello = strangers.pop(ready), messages[0] if messages else {}
            i, host, its_facts = hello.get("process"), str(hello.get("host")), hello.get("facts")
            if not isinstance(i, int) or i < 1 or not isinstance(its_facts, dict):
                peer.socket.close()
            elif i >= cluster.process_count or i in peers:
                twice = f"process {i} on {hosts.get(i)} has come already"
                reason = twice if i in peers else f"there are {cluster.process_count} of them"
                peer.send(refused=f"process {i} on {host} is refused: {reason}")
                peer.socket.close()
            else:
                peers[i], hosts[i] = peer, host
                if fault := describe_difference(i, host, its_facts, facts):
                    faults.append(fault)
                    deadline = min(deadline, time.monotonic() + 5)  # those who come until then hear of it too
    if len(hosts) < cluster.process_count and not faults:
        missing = ", ".join(str(i) for i in range(cluster.process_count) if i not in hosts)
        faults.append(
            f"process {missing} of {cluster.process_count} did not come to {cluster.coordinator} within "
            f"{START_SECONDS:.0f} seconds: start all of them with the same --coordinator and --num-processes"
        )
    if faults:
        for peer in [*peers.values(), *strangers.values()]:
            peer.send(refused="; ".join(faults))
        raise ValueError("; ".join(faults))
    with _listen(cluster, 0) as free:
        jax_port = free.getsockname()[1]
    ordered = [host for _, host in sorted(hosts.items())]
    for peer in peers.values():
        peer.send(welcome=ordered, jax_port=jax_port)
    return Coordinator(cluster, peers, ordered, jax_port, listener)


def _listen(cluster: ClusterInfo, port: int) -> socket.socket:
    """Listen on all addresses of this machine, or on loopback alone; port 0 stands for any free one."""
    dual = not cluster.loopback and socket.has_dualstack_ipv6()
    return socket.create_server(
        ("127.0.0.1" if cluster.loopback else "", port),
        family=socket.AF_INET6 if dual else socket.AF_INET,
        backlog=max(128, cluster.process_count),
        dualstack_ipv6=dual,
    )


def connect(cluster: ClusterInfo, facts: dict[str, str]) -> Coordinator:
    """On every other process: connect to process 0 and wait until the run begins. ValueError: process 0 refuses, or is
    not reached within START_SECONDS."""
    deadline = time.monotonic() + START_SECONDS
    while time.monotonic() < deadline:
        try:
            peer = Peer(socket.create_connection((cluster.host, cluster.port), timeout=min(5.0, START_SECONDS)))
        except OSError:
            time.sleep(0.2)
            continue
        peer.send(process=cluster.process_index, host=socket.gethostname(), facts=facts)
        while not peer.closed and time.monotonic() < deadline + 10:  # process 0 names who is missing at its deadline
            if not select.select([peer.socket], [], [], 0.5)[0]:
                continue
            for message in peer.receive():
                if "refused" in message:
                    raise ValueError(str(message["refused"]))
                if "welcome" in message:
                    return Coordinator(cluster, {0: peer}, message["welcome"], message["jax_port"])
        time.sleep(0.5)
    raise ValueError(
        f"process {cluster.process_index} cannot reach process 0 at {cluster.coordinator} within {START_SECONDS:.0f} "
        "seconds: start all processes with the same --coordinator, which is a name of process 0's machine"
    )


def describe_difference(i: int, host: str, facts: Mapping[str, str], expected: Mapping[str, str]) -> str:
    """The sentence that names the facts of process i that differ from those of process 0; empty where none does."""
    differing = ", ".join(
        f"{name} is {facts.get(name, 'unknown'):.80} instead of {expected.get(name, 'unknown'):.80}"
        for name in (expected | facts)
        if facts.get(name) != expected.get(name)
    )
    return f"process {i} on {host} is refused, as it differs from process 0: {differing}" if differing else ""
