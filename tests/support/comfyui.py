"""A faithful ComfyUI, as far as its page and its scripts need one: its queue, its history, what it
tells over /ws, and whose requests it refuses."""

from __future__ import annotations

import json
import re
import struct
import threading
import time
import uuid
import zlib
from email.message import Message
from http.server import BaseHTTPRequestHandler
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, urlsplit

from gpumanager.addresses import is_loopback
from gpumanager.gpu.simulated import OutOfMemory, SimulatedCard
from tests.support.fake import MIB, Answer, Fake, Page
from tests.support.websockets import CLOSE, PING, PONG, TEXT, Peer, accept

HTML = Path(__file__).with_suffix(".html")
STEPS = 10
"""Of a node's work, each of which is told of."""

FORBIDDEN: Answer = (403, None)


class ComfyUI(Fake):
    """/prompt answers at once, and a node may say how many `seconds` it takes; one that was deleted
    while it was pending never enters the history; /free answers an empty 200 and only sets a
    flag. Every path is there below /api, too. How far a prompt is, is told to the /ws of the
    client that sent it; how long the queue is, to all. To a loopback Host it refuses a page of
    another origin."""

    def __init__(self, card: SimulatedCard, name: str, mib: int) -> None:
        super().__init__(card, name, mib)
        self.changed = threading.Condition()
        self.pending: list[list[Any]] = []
        self.running: list[Any] | None = None
        self.history: dict[str, Any] = {}
        self.sockets: dict[str, Peer] = {}
        self.number = 0
        self.free_wanted = False
        self.held = 0
        self.interrupted = threading.Event()
        threading.Thread(target=self._render_all, name="renderer", daemon=True).start()

    # -- HTTP ------------------------------------------------------------------------------

    def refuses(self, headers: Message) -> Answer | None:
        """As its middleware does, against pages that have a browser send something here."""
        if headers.get("Sec-Fetch-Site") == "cross-site":
            return FORBIDDEN
        host, origin = headers.get("Host"), headers.get("Origin")
        if host is None or origin is None:
            return None
        local = is_loopback(urlsplit(f"//{host}").hostname or "")
        return FORBIDDEN if local and urlsplit(origin).netloc.lower() != host.lower() else None

    def handle(self, method: str, path: str, query: dict[str, list[str]], body: Any) -> Answer:
        if (method, path) == ("GET", "/"):
            return 200, Page("text/html; charset=utf-8", HTML.read_bytes())
        path = path.removeprefix("/api")
        with self.changed:
            if method == "GET":
                return self._get(path, query)
            if path == "/prompt":
                return self._take(body)
            if path == "/queue":
                if body.get("clear"):
                    self.pending = []
                gone = body.get("delete", [])
                self.pending = [each for each in self.pending if each[1] not in gone]
                self._tell_queue()
                return 200, None
            if path == "/interrupt":
                wanted = body.get("prompt_id")
                if self.running is not None and wanted in (None, self.running[1]):
                    self.interrupted.set()
                return 200, None
            if path == "/free":
                # `free_memory` alone unloads the models, too: a missing `unload_models` follows it.
                self.free_wanted |= bool(body.get("unload_models") or body.get("free_memory"))
                self.changed.notify_all()
                return 200, None
        return 404, {"error": "not found"}

    def _get(self, path: str, query: dict[str, list[str]]) -> Answer:
        if path == "/system_stats":
            device = {"name": "cuda:0", "index": 0, "torch_vram_total": self.held * MIB}
            return 200, {"system": {"python_version": "3.12.3"}, "devices": [device]}
        if path == "/prompt":
            return 200, self._exec_info()
        if path == "/queue":
            running = [] if self.running is None else [self.running]
            return 200, {"queue_running": running, "queue_pending": self.pending}
        if path == "/history":
            return 200, self.history
        if found := re.fullmatch(r"/history/([^/]+)", path):
            entry = self.history.get(found[1])
            return 200, {} if entry is None else {found[1]: entry}
        if path == "/view" and (found := re.fullmatch(r"it_(\d{5})_\.png", query["filename"][0])):
            return 200, Page("image/png", picture(int(found[1])))
        return 404, {"error": "not found"}

    def _take(self, body: Any) -> Answer:
        if not body.get("prompt"):
            error = {"type": "no_prompt", "message": "No prompt provided"}
            return 400, {"error": error, "node_errors": {}}
        self.number += 1
        job = body.get("prompt_id") or str(uuid.uuid4())
        more = {**body.get("extra_data", {}), "client_id": body.get("client_id")}
        self.pending.append([self.number, job, body["prompt"], more, []])
        self.changed.notify_all()
        self._tell_queue()
        return 200, {"prompt_id": job, "number": self.number, "node_errors": {}}

    def _exec_info(self) -> dict[str, Any]:
        busy = len(self.pending) + (self.running is not None)
        return {"exec_info": {"queue_remaining": busy}}

    # -- /ws -------------------------------------------------------------------------------

    def switch(self, handler: BaseHTTPRequestHandler) -> bool:
        parts = urlsplit(handler.path)
        if parts.path not in ("/ws", "/api/ws"):
            return False
        if self.refuses(handler.headers):
            handler.send_error(403)
            return True
        handler.close_connection = True
        handler.send_response(101, "Switching Protocols")
        handler.send_header("Upgrade", "websocket")
        handler.send_header("Connection", "Upgrade")
        handler.send_header(
            "Sec-WebSocket-Accept", accept(handler.headers.get("Sec-WebSocket-Key", ""))
        )
        handler.end_headers()
        sid = parse_qs(parts.query).get("clientId", [uuid.uuid4().hex])[0]
        peer = Peer(handler.connection, client=False)
        with self.changed:
            self.sockets[sid] = peer
            self._tell("status", {"status": self._exec_info(), "sid": sid}, sid)
        try:
            self._listen(peer)
        except (OSError, AssertionError):
            pass  # it broke off
        finally:
            with self.changed:
                if self.sockets.get(sid) is peer:
                    del self.sockets[sid]
        return True

    def _listen(self, peer: Peer) -> None:
        while (message := peer.receive()) is not None:
            if message.opcode in (CLOSE, PING):
                with self.changed:
                    peer.send(message.payload, PONG if message.opcode == PING else CLOSE)
            if message.opcode == CLOSE:
                return

    def _tell(self, kind: str, data: dict[str, Any], sid: str | None = None) -> None:
        """Tell one client, or all; with the lock held."""
        text = json.dumps({"type": kind, "data": data}).encode()
        for each, peer in [*self.sockets.items()]:
            if sid in (None, each):
                try:
                    peer.send(text, TEXT)
                except OSError:
                    del self.sockets[each]

    def _tell_queue(self) -> None:
        self._tell("status", {"status": self._exec_info()})

    # -- rendering -------------------------------------------------------------------------

    def _render_all(self) -> None:
        while True:
            with self.changed:
                if self.free_wanted:
                    self.free_wanted = False
                    self.card.free(self.name)
                    self.held = 0
                if not self.pending or self.settings.get("paused"):
                    self.changed.wait(0.05)
                    continue
                self.running = running = self.pending.pop(0)
                self.interrupted.clear()
            entry = {"prompt": running, **self._render(running)}
            with self.changed:
                self.history[running[1]] = entry
                self._tell_owner(running, "executing", {"node": None})
                self.running = None
                self._tell_queue()

    def _tell_owner(self, item: list[Any], kind: str, data: dict[str, Any]) -> None:
        sid = item[3].get("client_id")
        if sid is not None:
            self._tell(kind, {**data, "prompt_id": item[1]}, sid)

    def _said(self, item: list[Any], messages: list[Any], kind: str, **data: Any) -> None:
        with self.changed:
            told = {**data, "timestamp": round(time.time() * 1000)}
            messages.append([kind, {**told, "prompt_id": item[1]}])
            self._tell_owner(item, kind, told)

    def _render(self, item: list[Any]) -> dict[str, Any]:
        messages: list[Any] = []
        self._said(item, messages, "execution_start")
        try:
            if not self.held:
                self.card.allocate(self.name, self.needs)
                self.held = self.needs
        except OutOfMemory as error:
            message = f"Allocation on device {error}"
            self._said(item, messages, "execution_error", exception_message=message)
            return {"outputs": {}, "status": {"status_str": "error", "messages": messages}}
        self._said(item, messages, "execution_cached", nodes=[])
        first = self.job_s
        for node, what in item[2].items():
            if not self._work_on(item, node, what.get("seconds", first)):
                self._said(item, messages, "execution_interrupted", node_id=node, executed=[])
                return {"outputs": {}, "status": {"status_str": "error", "messages": messages}}
            first = 0.0
        images = [{"filename": f"it_{item[0]:05}_.png", "subfolder": "", "type": "output"}]
        output = {"images": images}
        with self.changed:
            self._tell_owner(item, "executed", {"node": "9", "output": output})
        self._said(item, messages, "execution_success")
        status = {"status_str": "success", "completed": True, "messages": messages}
        return {"outputs": {"9": output}, "status": status}

    def _work_on(self, item: list[Any], node: str, seconds: float) -> bool:
        """False if it was interrupted."""
        with self.changed:
            self._tell_owner(item, "executing", {"node": node, "display_node": node})
        for step in range(1, STEPS + 1):
            if self.interrupted.wait(seconds / STEPS):
                return False
            with self.changed:
                progress = {"node": node, "value": step, "max": STEPS}
                self._tell_owner(item, "progress", progress)
        return True


def picture(number: int) -> bytes:
    """A PNG, another one for each number."""
    size = 96
    hue = number * 67 % 256
    rows = b"".join(
        b"\0" + bytes(v for x in range(size) for v in (x * 2 + 40, y * 2 + 40, hue))
        for y in range(size)
    )
    chunks = (
        (b"IHDR", struct.pack("!IIBBBBB", size, size, 8, 2, 0, 0, 0)),
        (b"IDAT", zlib.compress(rows)),
        (b"IEND", b""),
    )
    return b"\x89PNG\r\n\x1a\n" + b"".join(
        struct.pack("!I", len(data)) + kind + data + struct.pack("!I", zlib.crc32(kind + data))
        for kind, data in chunks
    )
