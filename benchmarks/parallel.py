"""What `max_parallel` is worth: `python -m benchmarks.parallel`.

Eight chats come at once for a server that works on all that it has at the same time, as batching
ones do; each takes half a second there. Prints the seconds until all are answered, one by one and
with `max_parallel: 8`, as a Markdown table.
"""

from __future__ import annotations

import threading
import time

from tests.support.broker import config_for, live_broker
from tests.support.sockets import Connection, Received, ScriptedConsumer, answer
from tests.support.threads import Outcome

CHATS = 8
WORK_S = 0.5


def _seconds(most: int) -> float:
    pause = threading.Event()

    def work(connection: Connection, _: Received) -> None:
        pause.wait(WORK_S)
        connection.send(answer())

    with (
        ScriptedConsumer(work) as consumer,
        live_broker(config_for(consumer.url, consumer={"max_parallel": most})) as broker,
    ):
        broker.post("/v1/llm")
        began = time.monotonic()
        for client in [Outcome(lambda: broker.post("/v1/llm")) for _ in range(CHATS)]:
            client.result()
        return time.monotonic() - began


def main() -> None:
    alone, together = _seconds(1), _seconds(CHATS)
    print("| `max_parallel` | seconds for eight chats |")
    print("|---|---|")
    print(f"| 1 | {alone:.2f} |")
    print(f"| {CHATS} | {together:.2f} |")
    print(f"\n{alone / together:.1f} times sooner")


if __name__ == "__main__":
    main()
