"""A whole broker behind real waitress on a real port, in this process."""

from __future__ import annotations

import threading
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import requests
import waitress.server
from waitress.adjustments import Adjustments
from waitress.server import BaseWSGIServer, create_server
from waitress.wasyncore import close_all

from gpumanager.app import Broker
from gpumanager.config import parse_config
from gpumanager.gpu.device import Card
from gpumanager.keys import ApiKey
from gpumanager.web import server
from tests.support.sockets import RawClient
from tests.support.threads import PATIENCE_S, eventually


class LiveBroker:
    """A running broker. `post` and `get` are plain HTTP; `raw` shows the wire."""

    def __init__(self, broker: Broker, port: int, dispatcher: Any) -> None:
        self.dispatcher = dispatcher  # waitress's threads
        self.channels: dict[int, Any] = {}  # its connections
        self.broker = broker
        self.port = port
        self.url = f"http://127.0.0.1:{port}"
        self._session = requests.Session()
        self._session.trust_env = False

    def post(self, path: str, **more: Any) -> requests.Response:
        return self._session.post(self.url + path, timeout=PATIENCE_S, **more)

    def get(self, path: str, **more: Any) -> requests.Response:
        return self._session.get(self.url + path, timeout=PATIENCE_S, **more)

    def delete(self, path: str, **more: Any) -> requests.Response:
        return self._session.delete(self.url + path, timeout=PATIENCE_S, **more)

    def raw(self) -> RawClient:
        return RawClient(self.port)

    @property
    def stats(self) -> Any:
        return self.broker.card.scheduler.stats()

    def await_waiting(self, count: int) -> None:
        """Return once `count` requests are in line."""
        eventually(lambda: self.stats.queue_depth == count)

    def await_line(self, count: int) -> None:
        """Return once `count` requests run or wait."""
        eventually(lambda: len(self.broker.card.scheduler.queue()) == count)

    def await_idle(self, timeout: float = PATIENCE_S) -> None:
        """Return once nobody waits and nothing runs."""
        eventually(lambda: (self.stats.queue_depth, self.stats.in_flight) == (0, 0), timeout)

    def connection_of(self, client: RawClient) -> Any:
        """The server's end of a client's connection."""
        port = client.sock.getsockname()[1]
        (found,) = [each for each in [*self.channels.values()] if each.addr[1] == port]
        return found

    def close(self) -> None:
        self._session.close()


@contextmanager
def live_broker(
    config: str,
    *,
    card: Card | None = None,
    keys: Iterable[ApiKey] = (),
    callback_secret: bytes | None = None,
    state_file: Path | None = None,
    threads: int = 24,
) -> Iterator[LiveBroker]:
    """Serve the broker that `config` (YAML) describes, with the defaults it sets for waitress."""
    parsed = parse_config(config)
    kept = {name: value for name, value in vars(Adjustments).items() if not name.startswith("_")}
    making: Any = waitress.server
    channel, dispatcher = BaseWSGIServer.channel_class, making.ThreadedTaskDispatcher
    adjustments = making.Adjustments
    broker = Broker(
        parsed, card=card, keys=keys, callback_secret=callback_secret, state_file=state_file
    )
    try:
        server.set_defaults(parsed)
        sockets: dict[int, Any] = {}
        serving: Any = create_server(broker.flask, sockets, listen="127.0.0.1:0", threads=threads)
        broker.start()
        loop = threading.Thread(target=serving.run, name="waitress-loop", daemon=True)
        loop.start()
        own: Any = next(each for each in sockets.values() if isinstance(each, BaseWSGIServer))
        live = LiveBroker(broker, int(own.effective_port), serving.task_dispatcher)
        live.channels = own.active_channels
        try:
            yield live
        finally:
            live.close()
            broker.stop()
            serving.task_dispatcher.shutdown(timeout=PATIENCE_S)
            # On the loop's own thread, which would otherwise look up only once a second. It may
            # be awake already, and have closed the trigger before it is pulled.
            with suppress(OSError):
                own.trigger.pull_trigger(lambda: close_all(sockets))
            loop.join(PATIENCE_S)
            assert not loop.is_alive()
    finally:
        for name, value in kept.items():
            setattr(Adjustments, name, value)
        BaseWSGIServer.channel_class = channel
        making.ThreadedTaskDispatcher = dispatcher
        making.Adjustments = adjustments


def config_for(consumer_url: str, **changes: Any) -> str:
    """The YAML of a broker with one consumer, `mvoice`, that serves every kind.

    Keyword arguments are added at the top level; `consumer` is merged into the consumer.
    """
    import yaml

    consumer = {
        "url": consumer_url,
        "paths": {kind: f"/api/{kind}" for kind in ("tts", "stt", "llm", "image")},
        "timeouts": {"connect": 2, "first_byte": 5, "idle": 5, "total": 20},
        **changes.pop("consumer", {}),
    }
    return yaml.safe_dump(
        {
            "routing": dict.fromkeys(("tts", "stt", "llm", "image"), "mvoice"),
            "audio_proxy": "mvoice",
            "consumers": {"mvoice": consumer},
            **changes,
        }
    )
