"""What a running broker offers to clients of OpenAI's, Anthropic's and Ollama's protocols."""

from __future__ import annotations

from dataclasses import dataclass

from gpumanager.addresses import host_and_port, is_loopback
from gpumanager.client import KEY_ENV, UNAUTHORIZED, BrokerClient, BrokerUnavailable

NO_KEY = "unused"
"""What a client is given that insists on a key, where the broker has none."""

NO_MODEL = "MODEL"
"""What stands for a model's name where the broker lists none."""


@dataclass(frozen=True, slots=True)
class Offered:
    """What a broker offers: its `url`, whether it wants a key, the routes that some consumer
    serves, and the names of its models by kind of job. `shown_key` is a key that may be shown."""

    url: str
    needs_key: bool = False
    routes: frozenset[str] = frozenset()
    models: tuple[tuple[str, tuple[str, ...]], ...] = ()
    shown_key: str | None = None

    @property
    def openai_url(self) -> str:
        """The base URL for clients of OpenAI's protocol."""
        return f"{self.url}/v1"

    @property
    def is_here(self) -> bool:
        """Whether only programs on this machine, outside of containers, reach it."""
        return is_loopback(host_and_port(self.url)[0])

    def named(self, kind: str) -> list[str]:
        """The models for a kind of job."""
        return [name for name, kinds in self.models if kind in kinds]

    def first(self, kind: str, wanted: str | None = None) -> str:
        """The model to use for a kind: the one that is wanted, else the first there is."""
        return wanted or next(iter(self.named(kind)), NO_MODEL)

    def key(self, reference: str = f"${{{KEY_ENV}}}") -> str:
        """What stands for the key: a `reference` to where it is, never the key itself unless it
        may be shown."""
        if not self.needs_key:
            return NO_KEY
        return self.shown_key or reference


def offered(broker: BrokerClient) -> Offered:
    """Ask a broker. Raises BrokerUnavailable, for a broker that wants a key and was given none,
    too."""
    needs_key = _wants_key(broker.url)
    models = [(each["id"], tuple(each["kinds"])) for each in broker.get("/v1/models")["data"]]
    consumers = broker.get("/v1/status")["consumers"]
    routes = frozenset(route for each in consumers for route in each["routes"])
    return Offered(broker.url, needs_key, routes, tuple(models))


def _wants_key(url: str) -> bool:
    try:
        BrokerClient(url).get("/v1/models")
    except BrokerUnavailable as error:
        if error.status == UNAUTHORIZED:
            return True
        raise
    return False
