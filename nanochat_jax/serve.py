"""Serve a model: OpenAI's interface over HTTP, and a page to talk to it. Its settings, with examples: flags/serve.py.

The engine runs in one thread (serving/worker.py), HTTP on the event loop of this one (serving/app.py).
"""

import os
import signal
import socket
import sys

from nanochat_jax.checkpoints import find
from nanochat_jax.cli import main as cli_main
from nanochat_jax.cli.command_line import parse
from nanochat_jax.cli.device import compute_dtype, start_device
from nanochat_jax.cli.settings import check_bounds, require
from nanochat_jax.cli.waiting import saying
from nanochat_jax.flags.serve import ServeConfig
from nanochat_jax.inference.sampling import SamplingParams
from nanochat_jax.inference.tools import make_toolbox
from nanochat_jax.serving.app import ServerSettings, make_app
from nanochat_jax.serving.http import http_server
from nanochat_jax.serving.requests import MOST_ALTERNATIVES, Limits
from nanochat_jax.serving.worker import EngineWorker

CHUNK = 8  # tokens between two visits of the host: what a new request waits for, and a stream's steps
LOOPBACK = {"127.0.0.1", "localhost", "::1"}


def main(cfg: ServeConfig) -> int:
    """Serve until SIGTERM or SIGINT -> 0. OSError: the port is taken."""
    sampling = SamplingParams(cfg.temperature, cfg.top_k, cfg.max_new_tokens, cfg.top_p)
    check_bounds(cfg)
    require(sampling.temperature <= 2, f"--temperature must be at most 2, got {cfg.temperature}")
    api_key = os.environ.get("NANOCHAT_API_KEY") if cfg.api_key is None else cfg.api_key
    require(api_key != "", "--api-key, or NANOCHAT_API_KEY where it is not given, must not be empty")
    if cfg.host not in LOOPBACK and api_key is None:
        print("WARNING: who can reach this machine may use the model: --api-key asks for a key", file=sys.stderr)
    tools = make_toolbox(cfg.tool, cfg.tool_tokens)
    listening = listen(cfg.host, cfg.port)  # a port that is taken is an error before a model is read
    with listening:
        found = find.find_model(cfg.source, cfg.model_tag, cfg.step, cfg.base)
        start_device(cfg.device_type)
        with saying("reading the model"):
            model = find.chat_model_of(
                found,
                compute_dtype(cfg.dtype),
                slots=cfg.max_concurrent,
                chunk=CHUNK,
                alternatives=MOST_ALTERNATIVES,
                tools=tools,
            )
        worker = EngineWorker(model.engine, model.params, max_waiting=cfg.max_waiting)
        with saying("compiling"):
            worker.warm_up()
        capacity = cfg.max_concurrent + cfg.max_waiting
        settings = ServerSettings(
            model=cfg.served_model_name or f"{found.tag}-{found.source}",
            limits=Limits(cfg.max_messages, cfg.max_message_chars, cfg.max_total_chars, capacity, sampling),
            body_bytes=cfg.max_body_bytes,
            api_key=api_key,
            cors=cfg.cors,
            # A page from elsewhere whose name has been pointed to this machine would name its own.
            hosts=("127.0.0.1", "localhost", "[::1]") if cfg.host in LOOPBACK and not api_key else ("*",),
        )
        worker.start()
        serve(make_app(worker, settings), listening, f"{found} as {settings.model!r}")
        worker.stop()
    return 0


def listen(host: str, port: int) -> socket.socket:
    """A socket that listens nowhere yet, but has the address."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    listening = socket.socket(family, socket.SOCK_STREAM)
    listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listening.bind((host, port))
    except OSError as e:
        listening.close()
        raise OSError(f"--host={host} --port={port} cannot be listened at ({e.strerror}): choose another") from None
    return listening


def serve(app, listening: socket.socket, what: str) -> None:
    """Answer requests until a signal comes; those that have begun are answered to their end."""
    host, port = listening.getsockname()[:2]
    server = http_server(app)
    # uvicorn sends itself the signal that has ended it once more: here that is no reason to die of it.
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: None)
    shown = f"[{host}]" if ":" in host else host
    print(f"serving {what} at http://{shown}:{port}", flush=True)
    server.run(sockets=[listening])
    print("stopped", file=sys.stderr)


if __name__ == "__main__":
    cli_main.run_stage(main, parse(ServeConfig, prog="python -m nanochat_jax.serve"))
