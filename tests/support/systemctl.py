"""A stand-in for systemctl: it starts and ends a user's units as their files and drop-ins say, and
tells what systemd would, as far as setup asks."""

from __future__ import annotations

import json
import stat
import sys
from pathlib import Path

SCRIPT = """\
#!{python}
import json, os, shlex, signal, subprocess, sys, time
from pathlib import Path

words = [word for word in sys.argv[1:] if not word.startswith("--")]
log = Path(os.environ["SYSTEMCTL_LOG"])
with log.open("a") as out:
    out.write(json.dumps(words) + "\\n")
verb, unit = words[0], words[-1]
units = Path(os.environ["XDG_CONFIG_HOME"], "systemd", "user")
pid_file = log.with_name(f"{{unit}}.pid")
files = [units / unit, *sorted((units / f"{{unit}}.d").glob("*.conf"))]


def alive(pid):
    try:
        return "Z" not in Path(f"/proc/{{pid}}/stat").read_text().rpartition(")")[2][:3]
    except OSError:
        return False


pid = int(pid_file.read_text()) if pid_file.exists() else 0
if verb == "show" and unit != "show":
    print(pid)
elif verb == "is-active" and unit != "gpumanager.service":
    sys.exit(0 if pid and alive(pid) else 3)
elif verb == "cat":
    print("\\n".join(file.read_text() for file in files))
elif verb == "restart":
    if pid and alive(pid):
        os.kill(pid, signal.SIGTERM)
        while alive(pid):
            time.sleep(0.01)
    environ, command = dict(os.environ), ""
    for line in "\\n".join(file.read_text() for file in files).splitlines():
        key, _, value = line.partition("=")
        if key == "ExecStart":
            command = value
        if key == "Environment":
            name, _, value = value.partition("=")
            environ[name] = value
    quiet = subprocess.DEVNULL
    child = subprocess.Popen(shlex.split(command), env=environ, stdin=quiet, stdout=quiet,
                             stderr=quiet, start_new_session=True)
    pid_file.write_text(str(child.pid))
"""


def install(folder: Path) -> None:
    """Put it into a folder for the PATH."""
    folder.mkdir()
    file = folder / "systemctl"
    file.write_text(SCRIPT.format(python=sys.executable))
    file.chmod(file.stat().st_mode | stat.S_IEXEC)


def said(log: Path) -> list[list[str]]:
    """What it was told so far, without options; `log` is what SYSTEMCTL_LOG names."""
    return [json.loads(line) for line in log.read_text().splitlines()]
