"""A process that holds real CUDA memory, through the driver's own API.

`python -m tests.support.cuda_process PORT MIB` listens on loopback (port 0: any), allocates, and
prints its port; then it obeys lines on its standard input: `free`, `take MIB`, `fill BYTE`,
`check BYTE`, each answered with a line. It ends with its input.
"""

from __future__ import annotations

import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from importlib import import_module
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent.parent
MIB = 1024 * 1024


class Holder:
    """One allocation at a time, in a context of its own."""

    def __init__(self) -> None:
        self.cuda: Any = import_module("cuda.bindings.driver")
        driver = self.cuda
        self._checked(driver.cuInit(0))
        device = self._checked(driver.cuDeviceGet(0))
        context = self._checked(driver.cuDevicePrimaryCtxRetain(device))
        self._checked(driver.cuCtxSetCurrent(context))
        self.block: Any = None
        self.size = 0

    def take(self, mib: int) -> None:
        self.size = mib * MIB
        self.block = self._checked(self.cuda.cuMemAlloc(self.size))

    def free(self) -> None:
        self._checked(self.cuda.cuMemFree(self.block))
        self.block = None

    def fill(self, byte: int) -> None:
        self._checked(self.cuda.cuMemsetD8(self.block, byte, self.size))
        self._checked(self.cuda.cuCtxSynchronize())

    def check(self, byte: int) -> bool:
        sample = bytearray(MIB)
        self._checked(self.cuda.cuMemcpyDtoH(sample, self.block, MIB))
        return set(sample) == {byte}

    def _checked(self, result: Any) -> Any:
        status, *rest = result
        if status != self.cuda.CUresult.CUDA_SUCCESS:
            raise RuntimeError(str(status))
        return rest[0] if rest else None


def main() -> None:
    port, mib = int(sys.argv[1]), int(sys.argv[2])
    listening = socket.create_server(("127.0.0.1", port))
    holder = Holder()
    if mib:
        holder.take(mib)
    print(listening.getsockname()[1], flush=True)
    for line in sys.stdin:
        word, _, number = line.strip().partition(" ")
        answer: object = "done"
        if word == "free":
            holder.free()
        elif word == "take":
            holder.take(int(number))
        elif word == "fill":
            holder.fill(int(number))
        elif word == "check":
            answer = holder.check(int(number))
        print(answer, flush=True)


class CudaProcess:
    """One that runs."""

    def __init__(self, process: subprocess.Popen[str], port: int) -> None:
        self.pid = process.pid
        self.port = port
        self.process = process

    def ask(self, line: str) -> str:
        """Have it obey, and return what it says."""
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        self.process.stdin.write(line + "\n")
        self.process.stdin.flush()
        return self.process.stdout.readline().strip()


@contextmanager
def cuda_process(mib: int) -> Iterator[CudaProcess]:
    """Run one until the block is left."""
    process = subprocess.Popen(
        [sys.executable, "-m", "tests.support.cuda_process", "0", str(mib)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        cwd=ROOT,
        start_new_session=True,
    )
    assert process.stdout is not None
    try:
        line = process.stdout.readline()
        if not line:
            raise RuntimeError("no CUDA memory could be had")
        yield CudaProcess(process, int(line))
    finally:
        process.kill()
        process.communicate(timeout=20)


if __name__ == "__main__":
    main()
