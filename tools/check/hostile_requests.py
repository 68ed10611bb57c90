"""Attack a server with bodies, headers and disconnects that no client should send; ends with status 1 where one of them
got an answer of 500 or more, or none, where a slot or memory stays taken, or where a good request is answered otherwise
than before. The server runs in this process, with a tiny model.

python tools/check/hostile_requests.py                  # 2,000 requests, a line of JSON
python tools/check/hostile_requests.py --count 200 --seed 3
"""

import argparse
import concurrent.futures
import json
import random
import socket
import struct
import sys
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2]))

from nanochat_jax.distributed.mesh import make_mesh
from nanochat_jax.inference.engine import Engine
from nanochat_jax.inference.sampling import SamplingParams
from nanochat_jax.serving.app import ServerSettings, make_app
from nanochat_jax.serving.http import PatientProtocol, serving
from nanochat_jax.serving.requests import Limits
from nanochat_jax.serving.worker import EngineWorker
from tests.support import tiny
from tests.support.models import random_params, tiny_config

PATHS = ("/v1/chat/completions", "/v1/completions")
PATIENCE = 60.0  # seconds in which an answer must have come
MOST_GROWTH = 32 << 20  # bytes of this process, over the second half of the attack
SETTINGS = ServerSettings(
    model="tiny",
    limits=Limits(500, 8000, 32000, 64, SamplingParams(0.8, 50, 16)),
    body_bytes=1 << 16,
    body_seconds=2.0,
    hosts=("127.0.0.1", "localhost"),
)
HI = {"role": "user", "content": "Hi"}
GOOD = (
    {"messages": [HI], "max_tokens": 6, "n": 2, "seed": 1, "logprobs": True, "top_logprobs": 2, "stop": ["x"]},
    {"prompt": ["ab", "c"], "max_tokens": 6, "seed": 1, "logprobs": 2, "echo": True, "temperature": 0.5},
)
VALUES = (
    *(None, True, False, 0, -1, 1, 3, 2**31, 2**63, -(2**63), 10**400, 0.5, -0.5, 1e308, float("nan"), float("inf")),
    *("", "x", "\ud800", "\u0000", "<|bos|>", "😀" * 50, "x" * 9000, [], {}, [[]], [{}], [None], [1, "a"], [2**40]),
    *([0] * 3000, [HI] * 600, [HI, HI], {"role": "user"}, {"type": "text"}, [{"type": "image_url"}], "true", "1"),
)
FIELDS = (
    *("model", "messages", "prompt", "max_tokens", "max_completion_tokens", "temperature", "top_p", "top_k", "stop"),
    *("seed", "n", "logprobs", "top_logprobs", "stream", "stream_options", "echo", "suffix", "best_of", "tools"),
    *("logit_bias", "response_format", "frequency_penalty", "user", "\ud800"),
)


def hostile_body(rng: random.Random) -> bytes:
    """A good body with some fields replaced, or with damaged text."""
    body = dict(rng.choice(GOOD))
    for _ in range(rng.randint(1, 3)):
        kind = rng.random()
        if kind < 0.7:
            body[rng.choice(FIELDS)] = rng.choice(VALUES)
        elif kind < 0.85:
            body["messages"] = [{"role": rng.choice(("user", "system", 3, None)), "content": rng.choice(VALUES)}]
        else:
            body.pop(rng.choice([*body]), None)
    text = json.dumps(body).encode()
    kind = rng.random()
    if kind < 0.05:
        return text[: rng.randint(0, len(text))]
    if kind < 0.1:
        place = rng.randrange(len(text))
        return text[:place] + rng.randbytes(rng.randint(1, 9)) + text[place:]
    if kind < 0.12:
        return b"[" * 60_000
    if kind < 0.14:
        return rng.randbytes(200)
    return text


def hostile_request(rng: random.Random) -> bytes:
    """The bytes of a whole request."""
    body, headers = hostile_body(rng), ["Host: 127.0.0.1", "Connection: close", "Content-Type: application/json"]
    method, path, length = "POST", rng.choice(PATHS), str(len(body))
    kind = rng.random()
    if kind < 0.05:
        headers[2] = rng.choice(("Content-Type: text/plain", "Content-Type:", "X: y", "Content-Type: \xff"))
    elif kind < 0.1:
        headers.append(
            rng.choice(("Authorization: \xe9", "Expect: 100-continue", "A" * 3000 + ": b", "Cookie: " + "c" * 9000))
        )
    elif kind < 0.13:
        length = rng.choice(("-1", "x", "0", "9" * 30, "1"))
    elif kind < 0.16:
        method = rng.choice(("GET", "PUT", "HEAD", "OPTIONS", "BREW", "post", "\x00"))
    elif kind < 0.19:
        path = rng.choice(
            ("/", "/v1", "//", "/../../etc/passwd", "/v1/models/%00%ff", "/" + "a" * 5000, "*", "x", "/?" + "b" * 500)
        )
    elif kind < 0.21:
        headers[0] = "Host: evil.example"
    elif kind < 0.23:
        return rng.randbytes(rng.randint(1, 500))
    elif kind < 0.26:
        chunks = b"".join(b"%x\r\n%b\r\n" % (1, bytes([byte])) for byte in body[:200]) + b"0\r\n\r\n"
        head = "\r\n".join([f"POST {path} HTTP/1.1", *headers, "Transfer-Encoding: chunked"])
        return head.encode("latin-1") + b"\r\n\r\n" + chunks
    head = "\r\n".join([f"{method} {path} HTTP/1.1", *headers, f"Content-Length: {length}"])
    return head.encode("latin-1") + b"\r\n\r\n" + body


def good_request(number: int, stream: bool = False) -> bytes:
    """One that must be answered."""
    body = json.dumps(GOOD[number] | {"stream": stream}).encode()
    head = (
        f"POST {PATHS[number]} HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\nContent-Type: application/json\r\n"
    )
    return head.encode() + b"Content-Length: %d\r\n\r\n" % len(body) + body


def exchange(port: int, request: bytes, send: int | None = None, read: int | None = None, reset: bool = False) -> str:
    """The status of the answer, "closed" without one, "left" where only `send` bytes were sent or `read` read."""
    with socket.create_connection(("127.0.0.1", port), timeout=PATIENCE) as connection:
        if reset:  # the connection ends with an error instead of an orderly end
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        answer = b""
        try:
            connection.sendall(request[:send])
            while send is None and (read is None or len(answer) < read) and (piece := connection.recv(1 << 16)):
                answer += piece
        except (ConnectionError, BrokenPipeError):
            pass
    if send is not None or read is not None:
        return "left"
    status = answer.split(b" ")[1:2]
    return status[0].decode("latin-1") if answer.startswith(b"HTTP/1.1 ") else "closed"


def attack_once(port: int, seed: int) -> str:
    """A bad request, or one whose client goes away -> what came of it. TimeoutError: nothing, for too long."""
    rng = random.Random(seed)
    kind = rng.random()
    if kind < 0.75:
        return exchange(port, hostile_request(rng))
    request = good_request(rng.randrange(2), stream=rng.random() < 0.6)
    reset = rng.random() < 0.5
    if kind < 0.85:
        return exchange(port, request, send=rng.randrange(len(request) + 1), reset=reset)
    return exchange(port, request, read=rng.choice((0, 1, 200, 900)), reset=reset)


def answer_to(port: int, number: int) -> list[str]:
    """The texts of the answer to a good request. Their log-probabilities are rounded in other ways where prompts come
    to the device in other company."""
    with socket.create_connection(("127.0.0.1", port), timeout=PATIENCE) as connection:
        connection.sendall(good_request(number))
        answer = b"".join(iter(lambda: connection.recv(1 << 16), b""))
    choices = json.loads(answer.partition(b"\r\n\r\n")[2])["choices"]
    return [choice["text"] if "text" in choice else choice["message"]["content"] for choice in choices]


def resident_bytes() -> int:
    """Memory of this process."""
    pages = int(Path("/proc/self/statm").read_text().split()[1]) if Path("/proc/self/statm").exists() else 0
    return pages * 4096


def attack(worker: EngineWorker, port: int, count: int, seed: int, say: Callable[[str], None]) -> dict:
    """Many at once -> what came of them, and the faults as sentences."""
    before, faults, found = [answer_to(port, n) for n in range(2)], [], Counter()
    memory = [resident_bytes()]
    with concurrent.futures.ThreadPoolExecutor(8) as pool:
        for half in range(2):
            seeds = range(seed * 10**6 + half * count // 2, seed * 10**6 + (half + 1) * count // 2)
            for one, future in [(one, pool.submit(attack_once, port, one)) for one in seeds]:
                try:
                    status = future.result()
                except TimeoutError:
                    status = "none"
                found[status] += 1
                if status == "none" or status.startswith("5"):
                    faults.append(f"request {one} got the answer {status}")
            memory.append(resident_bytes())
            say(f"{sum(found.values())} requests: {dict(found)}, {memory[-1] >> 20} MiB")
    until = time.monotonic() + PATIENCE
    while (worker.open_jobs or worker.running) and time.monotonic() < until:
        time.sleep(0.05)
    if worker.open_jobs or worker.running:
        faults.append(f"{worker.open_jobs} jobs are open and {worker.running} slots taken when nobody asks any more")
    if [answer_to(port, n) for n in range(2)] != before:
        faults.append("a good request is answered otherwise than before")
    if memory[2] - memory[1] > MOST_GROWTH:
        faults.append(f"memory has grown by {(memory[2] - memory[1]) >> 20} MiB in the second half")
    return {"requests": count, "seed": seed, "found": dict(found), "mib": [x >> 20 for x in memory], "faults": faults}


def tiny_worker() -> EngineWorker:
    """With four slots, and room for 60 jobs."""
    config = tiny_config(vocab_size=265, padded_vocab=320, n_layer=1, windows=(-1,), sequence_len=64)
    sizes = {"slots": 4, "chunk": 4, "context": 64, "alternatives": 20}
    engine = Engine(config, tiny.tokenizer(), make_mesh("data=1"), **sizes)
    return EngineWorker(engine, random_params(config), max_waiting=60)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--count", type=int, default=2000)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    worker = tiny_worker()
    worker.warm_up()
    worker.start()
    PatientProtocol.header_seconds = 2.0
    with serving(make_app(worker, SETTINGS)) as url:
        port = int(url.rsplit(":", 1)[1])
        found = attack(worker, port, args.count, args.seed, lambda line: print(line, file=sys.stderr))
    worker.stop()
    print(json.dumps(found), flush=True)
    sys.exit(bool(found["faults"]))


if __name__ == "__main__":
    main()
