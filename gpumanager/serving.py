"""The broker as a process: logs, signals, the server in front of it, systemd's watchdog."""

from __future__ import annotations

import errno
import logging
import os
from collections.abc import Callable
from functools import partial

from gpumanager.app import Broker
from gpumanager.config import Config
from gpumanager.consumers.statefile import state_path
from gpumanager.host.notify import ALIVE, READY, STOPPING, Notifier
from gpumanager.host.processes import SystemProcesses, programs_at
from gpumanager.keys import GUARD_IT, KeysError, load_callback_secret, load_keys, unguarded
from gpumanager.telemetry import logs
from gpumanager.web import server
from gpumanager.worker import PeriodicWorker

log = logging.getLogger(__name__)


def serve(
    config: Config,
    read_config: Callable[[], Config] | None = None,
    config_file: str | None = None,
) -> int:
    """Serve the broker on `config.listen` until it is told to end; returns the exit code.
    `read_config` reads the config anew for a reload, from `config_file`.

    To be called from the main thread.
    """
    try:
        broker = prepare(config, read_config, config_file)
    except KeysError as error:
        log.error("bad keys", extra={"reason": str(error)})
        return 2
    except server.CannotListen as error:
        log.error("cannot listen", extra=_told(error.address, str(error), taken=error.taken))
        return 2
    if config_file is not None:
        log.info("config read", extra={"file": os.path.abspath(config_file)})
    notifier = Notifier()
    watchdog = None
    if notifier.watchdog_s is not None:
        watchdog = PeriodicWorker(
            "watchdog", partial(_sign_of_life, broker, notifier), retry_s=notifier.watchdog_s
        )

    def listening() -> None:
        notifier.tell(READY)
        if watchdog is not None:
            watchdog.start()

    broker.lifecycle.when_draining(partial(notifier.tell, STOPPING))
    try:
        server.run(broker.flask, listening)
    except (OSError, ValueError) as error:  # waitress: a host name that cannot be resolved
        taken = getattr(error, "errno", None) == errno.EADDRINUSE
        # A trace would tell nothing more.
        log.error("cannot listen", extra=_told(config.listen, str(error), taken=taken))
        return 1
    finally:
        if watchdog is not None:
            watchdog.stop()
        broker.stop()
    return 0


def _told(address: str, reason: str, *, taken: bool) -> dict[str, str]:
    """What the log says of an address that cannot be had."""
    told = {"listen": address, "reason": reason}
    if taken:
        programs = programs_at(int(address.rpartition(":")[2]), SystemProcesses())
        told["taken_by"] = " and ".join(programs) or "a program that this account cannot see"
    return told


def _sign_of_life(broker: Broker, notifier: Notifier) -> float:
    """Tell systemd that the broker is alive: that its scheduler answers, which takes the lock
    that everything hangs on."""
    broker.card.scheduler.stats()
    notifier.tell(ALIVE)
    return notifier.watchdog_s or 1.0


def prepare(
    config: Config,
    read_config: Callable[[], Config] | None = None,
    config_file: str | None = None,
) -> Broker:
    """A started broker, with logs, signals and the server's defaults set for this process.

    Raises KeysError if the API keys cannot be read, CannotListen if one of the config's ports
    cannot be had.
    """
    logs.configure(config.log)
    server.check_ports(config)
    server.set_defaults(config)
    keys = load_keys(os.environ, config.auth.keys_file)
    if without := [key.name for key in keys if key.role is None]:
        # As before there were roles, so that an update takes nothing from anybody.
        log.warning("keys without a role are admins", extra={"keys": " ".join(without)})
    if unguarded(config.host, keys):
        log.warning(
            "open to everybody who can reach it: there are no keys",
            extra={"listen": config.listen, "advice": GUARD_IT},
        )
    broker = Broker(
        config,
        keys=keys,
        callback_secret=load_callback_secret(
            os.environ, config.jobs.callback_secret_file, wanted=bool(config.jobs.callbacks)
        ),
        state_file=state_path(config.state_file, config.listen, os.environ),
        read_config=read_config,
        config_file=None if config_file is None else os.path.abspath(config_file),
    )
    broker.lifecycle.install_signal_handlers(broker.reload)
    broker.start()
    return broker
