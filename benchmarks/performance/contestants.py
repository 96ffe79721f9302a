"""Who is measured, and how each is started: on loopback, in front of the same upstream."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import psutil
import yaml

from benchmarks.performance import client
from tests.support.ports import free_port

ROOT = Path(__file__).parent.parent.parent
START_S = 90.0

HAPROXY = """
global
  maxconn 5000
defaults
  mode http
  option http-no-delay
  timeout connect 5s
  timeout client 120s
  timeout server 120s
  timeout queue 120s
frontend it
  bind 127.0.0.1:{port}
  default_backend up
backend up
  server up 127.0.0.1:{upstream}{maxconn}
"""

NGINX = """
daemon off;
{user}
pid {folder}/nginx.pid;
error_log {folder}/nginx.err;
worker_processes 2;
events {{ worker_connections 4096; }}
http {{
  access_log off;
  client_body_temp_path {folder}/body;
  proxy_temp_path {folder}/proxy;
  fastcgi_temp_path {folder}/f; uwsgi_temp_path {folder}/u; scgi_temp_path {folder}/s;
  client_max_body_size 0;
  keepalive_requests 1000000;
  upstream up {{ server 127.0.0.1:{upstream}; keepalive 64; }}
  server {{
    listen 127.0.0.1:{port};
    location / {{
      proxy_pass http://up;
      proxy_http_version 1.1;
      proxy_set_header Connection "";
      proxy_buffering off;
    }}
  }}
}}
"""

LITELLM = """
model_list:
  - model_name: it
    litellm_params: {{model: openai/it, api_base: "http://127.0.0.1:{upstream}/v1", api_key: x}}
general_settings: {{master_key: sk-1234}}
"""


@dataclass
class Running:
    """A contestant that serves. `paths` maps what is wanted (`chat`, `job`, `bulk`, `upload`) to
    its path there; what it cannot do is missing."""

    name: str
    port: int
    paths: dict[str, str]
    pid: int | None = None
    started_s: float = 0.0
    openai: bool = False
    extra: dict[str, str] = field(default_factory=dict)

    def cpu_s(self) -> float:
        """Seconds of CPU its processes have used."""
        return sum(sum(each.cpu_times()[:2]) for each in self._processes())

    def rss_mib(self) -> float:
        """Resident memory of its processes."""
        return sum(each.memory_info().rss for each in self._processes()) / 1024**2

    def _processes(self) -> list[psutil.Process]:
        if self.pid is None:
            return []
        first = psutil.Process(self.pid)
        return [first, *first.children(recursive=True)]


PLAIN = {"chat": "/v1/chat/completions", "job": "/job", "bulk": "/bulk", "upload": "/upload"}
BROKER = {"chat": "/v1/llm", "job": "/v1/tts", "bulk": "/v1/image", "upload": "/v1/stt"}


@contextmanager
def direct(upstream: int) -> Iterator[Running]:
    """No proxy at all."""
    yield Running("direct", upstream, PLAIN)


@contextmanager
def haproxy(folder: Path, upstream: int, *, serial: bool) -> Iterator[Running]:
    """HAProxy; `serial`: one connection to the upstream, the others wait."""
    port = free_port()
    file = folder / f"haproxy-{serial}.cfg"
    file.write_text(
        HAPROXY.format(port=port, upstream=upstream, maxconn=" maxconn 1" if serial else "")
    )
    name = "HAProxy, maxconn 1" if serial else "HAProxy"
    with _started([_binary("haproxy"), "-db", "-f", str(file)], name, port, PLAIN) as running:
        yield running


@contextmanager
def nginx(folder: Path, upstream: int) -> Iterator[Running]:
    """nginx with kept-alive connections to the upstream, unbuffered."""
    port = free_port()
    file = folder / "nginx.conf"
    user = "" if os.getuid() else "user root;"  # its temporary files lie in our folder
    file.write_text(NGINX.format(port=port, upstream=upstream, folder=folder, user=user))
    command = [_binary("nginx"), "-c", str(file), "-p", str(folder)]
    with _started(command, "nginx", port, PLAIN) as running:
        yield running


@contextmanager
def litellm(folder: Path, upstream: int) -> Iterator[Running]:
    """LiteLLM's proxy, one worker, with the upstream as an OpenAI-compatible model."""
    port = free_port()
    file = folder / "litellm.yaml"
    file.write_text(LITELLM.format(upstream=upstream))
    command = [_binary("litellm"), "--config", str(file), "--port", str(port)]
    environment = {
        "LITELLM_LOCAL_MODEL_COST_MAP": "True",
        "LITELLM_LOG": "ERROR",
        "LITELLM_DANGEROUSLY_PERMIT_WEAK_OR_UNSET_MASTER_KEY": "true",  # on loopback, for a while
    }
    paths = {"chat": "/v1/chat/completions"}
    with _started(
        [*command, "--host", "127.0.0.1", "--telemetry", "False"],
        "LiteLLM",
        port,
        paths,
        environment=environment,
        openai=True,
    ) as running:
        yield running


@contextmanager
def broker(
    folder: Path, upstream: int, *, kind: str = "locked", probed: int = 1
) -> Iterator[Running]:
    """The broker; `probed` consumers are asked how they are every five seconds. With one of them
    its line has room for a thousand, else it is as by default."""
    port = free_port()
    file = folder / f"broker-{kind}-{probed}.yaml"
    base = f"http://127.0.0.1:{upstream}"
    consumers = {
        "it": {
            "url": base,
            "health": "/health",
            "paths": {
                "llm": "/v1/chat/completions",
                "tts": "/job",
                "image": "/bulk",
                "stt": "/upload",
            },
        }
    }
    for number in range(1, probed):
        consumers[f"more{number}"] = {"url": base, "health": "/health"}
    config = {
        "listen": f"127.0.0.1:{port}",
        "state_file": str(folder / f"state-{port}.json"),
        "scheduler": {"kind": kind} | ({"max_queue": 1100} if probed == 1 else {}),
        "log": {"level": "warning"},
        "routing": dict.fromkeys(("tts", "stt", "llm", "image"), "it"),
        "consumers": consumers,
    }
    file.write_text(yaml.safe_dump(config))
    with _started(
        [str(Path(sys.executable).parent / "waitress-serve"), "wsgi:app"],
        f"gpumanager, {kind}",
        port,
        BROKER,
        environment={"GPUMANAGER_CONFIG": str(file)},
    ) as running:
        yield running


def _binary(name: str) -> str:
    beside = Path(sys.executable).parent / name
    apart = ROOT / ".venv-bench" / "bin" / name
    found = next((str(p) for p in (apart, beside) if p.exists()), None)
    found = found or shutil.which(name) or shutil.which(name, path="/usr/sbin:/sbin")
    if found is None:
        raise FileNotFoundError(f"{name} is not installed")
    return found


@contextmanager
def _started(
    command: list[str],
    name: str,
    port: int,
    paths: dict[str, str],
    *,
    environment: dict[str, str] | None = None,
    openai: bool = False,
) -> Iterator[Running]:
    with tempfile.TemporaryFile() as said:
        began = time.perf_counter()
        process = subprocess.Popen(
            command,
            cwd=ROOT,
            env={**os.environ, **(environment or {})},
            stdin=subprocess.DEVNULL,
            stdout=said,
            stderr=subprocess.STDOUT,
        )
        try:
            data = client.request(paths["chat"], model=openai)
            while True:
                try:
                    client.one_by_one(port, data, 1)
                    break
                except (OSError, client.BadAnswer) as error:
                    if process.poll() is not None or time.perf_counter() > began + START_S:
                        said.seek(0)
                        last = said.read()[-2000:].decode(errors="replace")
                        raise RuntimeError(f"{name} did not start: {error}\n{last}") from error
                    time.sleep(0.005)
            took = time.perf_counter() - began
            yield Running(name, port, paths, process.pid, took, openai)
        finally:
            process.terminate()
            try:
                process.wait(15)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait(5)
