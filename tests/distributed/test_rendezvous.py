"""How processes meet: who is missing, who differs and who is a stranger.

Run: python -m pytest tests/distributed/test_rendezvous.py
"""

import re
import socket
import threading
import time

import pytest

from nanochat_jax.distributed import processes, rendezvous
from nanochat_jax.distributed.cluster import ClusterInfo
from nanochat_jax.distributed.rendezvous import accept_processes, connect, describe_difference
from tests.support.process_runs import free_port


def cluster_of_three(monkeypatch, seconds):
    """Process 0 of three, which wait for each other for so long."""
    monkeypatch.setattr(rendezvous, "START_SECONDS", seconds)
    return ClusterInfo(f"127.0.0.1:{free_port()}", 3, 0)


def test_who_does_not_come_is_named_and_who_finds_nobody_says_so(monkeypatch):
    cluster = cluster_of_three(monkeypatch, 2.0)
    with pytest.raises(ValueError, match=r"process 1, 2 of 3 did not come to 127.0.0.1:\d+ within 2 seconds: start"):
        accept_processes(cluster, {})
    with pytest.raises(ValueError, match=r"process 1 cannot reach process 0 at 127.0.0.1:\d+ within 2 seconds"):
        connect(ClusterInfo(cluster.coordinator, 3, 1), {})


def test_a_stranger_does_no_harm_and_a_number_that_comes_twice_is_refused(monkeypatch):
    cluster, refused = cluster_of_three(monkeypatch, 5.0), {}
    strangers = (b"GET / HTTP/1.1\r\n\r\n", b'{"process": "x"}\n', b"[1]\n", b'{"process": 99, "facts": {}}\n')

    def connect_as_process_1(name):
        try:
            connect(ClusterInfo(cluster.coordinator, 3, 1), {"code": "a"})
        except ValueError as e:
            refused[name] = str(e)

    threads = [threading.Thread(target=connect_as_process_1, args=[name], daemon=True) for name in ("first", "second")]

    def come():
        time.sleep(0.5)
        for words in strangers:
            with socket.create_connection((cluster.host, cluster.port)) as stranger:
                stranger.sendall(words)
        for thread in threads:
            thread.start()
            time.sleep(0.5)

    threading.Thread(target=come, daemon=True).start()
    with pytest.raises(ValueError, match="process 2 of 3 did not come"):
        accept_processes(cluster, {"code": "a"})
    for thread in threads:
        thread.join(10)
    assert "process 2 of 3 did not come" in refused["first"]
    assert re.fullmatch("process 1 on .* is refused: process 1 on .* has come already", refused["second"])


def test_other_code_and_versions_are_named_with_process_and_host():
    ours = {"jax": "0.12.0", "code": processes.code_hash(), "--seed": "1"}
    assert describe_difference(3, "b", ours, ours) == ""
    said = describe_difference(3, "b", ours | {"code": "beef", "jax": "0.11.1"}, ours)
    assert said.startswith("process 3 on b is refused, as it differs from process 0: jax is 0.11.1 instead of 0.12.0, ")
    assert f"code is beef instead of {ours['code']}" in said and "seed" not in said
    assert "--mesh is unknown instead of" in describe_difference(1, "a", ours, ours | {"--mesh": "data=8"})
