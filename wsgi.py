"""For WSGI servers: `waitress-serve wsgi:app`.

Reads the config that GPUMANAGER_CONFIG names, else config/consumers.yaml, and starts the
broker's threads on import, since this module is the process's composition root.
"""

from __future__ import annotations

import atexit
import os
import sys
from functools import partial

from gpumanager.config import ConfigError, config_path_from_env, load_config
from gpumanager.keys import KeysError
from gpumanager.serving import prepare
from gpumanager.web.server import CannotListen

_path = config_path_from_env(os.environ)
_read = partial(load_config, _path)
try:
    _broker = prepare(_read(), _read, _path)
except (CannotListen, ConfigError, KeysError) as error:
    print(error, file=sys.stderr)
    raise SystemExit(2) from None

atexit.register(_broker.stop)
app = _broker.flask
