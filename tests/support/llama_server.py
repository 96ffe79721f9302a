"""llama.cpp's own HTTP server, as xllamacpp brings it along, in a process of its own.

`python -m tests.support.llama_server MODEL.gguf NAME PORT` serves on loopback until it is ended.
"""

from __future__ import annotations

import signal
import sys

import xllamacpp


def main() -> None:
    path, name, port = sys.argv[1:4]
    settings = xllamacpp.CommonParams()
    settings.model.path = path
    settings.model_alias = {name}
    settings.hostnames = ["127.0.0.1"]
    settings.port = int(port)
    settings.n_ctx = 2048
    settings.n_parallel = 1
    settings.cpuparams.n_threads = 2
    server = xllamacpp.Server(settings)  # loads the model, and listens on threads of its own
    print(server.listening_address, flush=True)
    signal.sigwait({signal.SIGTERM, signal.SIGINT})


if __name__ == "__main__":
    # Before the server starts its threads, which inherit it: else the signal ends one of them.
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM, signal.SIGINT})
    main()
