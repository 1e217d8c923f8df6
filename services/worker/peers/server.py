"""Where a worker is reached by its peers: a Unix socket for its own host, TCP for others.

Threads: one that accepts, one for each connection; a topic's handler runs in its connection's.
Callers that have not proven yet that they know the secret are few and have little time, so that
strangers keep no peer out for long.
"""

import contextlib
import hmac
import logging
import os
import selectors
import shutil
import socket
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path

import msgspec

from services.worker.peers.address import PeerAddress, host_id, place_of
from services.worker.peers.link import CALL_BYTES_MAX, Call, PeerLink, proof_of
from services.worker.peers.wire import close_all
from shared.errors import ConfigInvalid, PeerLost

log = logging.getLogger(__name__)

HANDSHAKE_S = 2.0  # for a caller to prove that it knows the secret
HELLO_S = 5.0  # for its first words then
STRANGERS_MAX = 32  # callers in the handshake; a newer one takes the place of the oldest
NAMELESS = sys.platform == "linux"
"""Unix sockets without a file: nothing is left behind by a process that was killed."""
JOIN_S = 2.0  # for all threads together, when the server closes
_SOCKET_PATH_MAX = 100  # bytes; the kernel takes 108, or 104
_ACCEPT_RETRY_S = 0.05

Handler = Callable[[PeerLink, bytes], None]
"""Gets the link and the caller's hello. The link is closed when it returns; what it raises is
logged, and told to the caller as PeerRefused."""


class PeerServer:
    """``address`` goes to other workers over the bus; who does not know its secret is refused.
    ``host`` is both where it listens and what is told to other hosts."""

    def __init__(
        self,
        *,
        worker_id: str,
        host: str = "127.0.0.1",
        port: int = 0,
        connections_max: int = 256,
    ) -> None:
        self._worker_id, self._host, self._connections_max = worker_id, host, connections_max
        self._lock = threading.Lock()
        self._handlers: dict[str, Handler] = {}
        self._links: dict[PeerLink, threading.Thread] = {}
        self._strangers: dict[PeerLink, None] = {}  # of those, not let in yet; oldest first
        self._friends: set[PeerLink] = set()  # let in
        self._closing = False
        self._secret = os.urandom(32).hex()
        self._folder: Path | None = None
        self._listeners: list[socket.socket] = []
        try:
            path = self._listen(port)
        except BaseException:
            self._release()
            raise
        self.address = PeerAddress(
            worker_id=worker_id,
            host_id=host_id(),
            path=path,
            host=host,
            port=self._listeners[1].getsockname()[1],
            secret=self._secret,
        ).encode()
        self._waker, self._woken = socket.socketpair()
        self._acceptor = threading.Thread(
            target=self._accept, name=f"peers-{worker_id}", daemon=True
        )
        self._acceptor.start()

    @property
    def host(self) -> str:
        """Where it listens."""
        return self._host

    def offer(self, topic: str, handler: Handler) -> None:
        """From now on; an earlier handler of ``topic`` gets no new callers."""
        with self._lock:
            self._handlers[topic] = handler

    def withdraw(self, topic: str, handler: Handler | None = None) -> None:
        """Refuse new callers; links that stand go on. With ``handler``: only if it is still the
        one that serves ``topic``."""
        with self._lock:
            if handler is None or self._handlers.get(topic) == handler:
                self._handlers.pop(topic, None)

    def close(self) -> None:
        """Idempotent. All links are closed; waits up to JOIN_S for handlers to return."""
        with self._lock:
            if self._closing:
                return
            self._closing = True
            links = dict(self._links)
        self._waker.send(b"x")
        for link in links:
            link.close()
        deadline_s = time.monotonic() + JOIN_S
        for thread in (self._acceptor, *links.values()):
            if thread is not threading.current_thread():
                thread.join(max(0.0, deadline_s - time.monotonic()))
        if slow := [thread.name for thread in links.values() if thread.is_alive()]:
            log.warning("peers.handlers_left", extra={"threads": slow})
        self._waker.close()
        self._woken.close()
        self._release()

    def _listen(self, port: int) -> str:
        path = f"@oserve-peer-{os.urandom(16).hex()}" if NAMELESS else self._file()
        family = socket.AF_INET6 if ":" in self._host else socket.AF_INET
        for kind, place in ((socket.AF_UNIX, place_of(path)), (family, (self._host, port))):
            listener = socket.socket(kind, socket.SOCK_STREAM)
            self._listeners.append(listener)
            if kind != socket.AF_UNIX:
                listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            listener.bind(place)
            listener.listen(self._connections_max)
            listener.setblocking(False)
        return path

    def _file(self) -> str:
        """In a folder that only our own user may open."""
        self._folder = Path(tempfile.mkdtemp(prefix="oserve-peer-"))
        path = str(self._folder / "peer")
        if len(os.fsencode(path)) > _SOCKET_PATH_MAX:
            raise ConfigInvalid(
                field="TMPDIR", value=path, remedy="a Unix socket needs a shorter path"
            )
        return path

    def _release(self) -> None:
        for listener in self._listeners:
            listener.close()
        if self._folder is not None:
            shutil.rmtree(self._folder, ignore_errors=True)

    def _accept(self) -> None:
        with selectors.DefaultSelector() as selector:
            for listener in self._listeners:
                selector.register(listener, selectors.EVENT_READ)
            selector.register(self._woken, selectors.EVENT_READ)
            while not self._closing:
                for key, _ in selector.select():
                    if key.fileobj is not self._woken:
                        self._accept_from(key.fileobj)  # pyright: ignore[reportArgumentType]

    def _accept_from(self, listener: socket.socket) -> None:
        """Whatever goes wrong costs this caller its connection, and the others a moment: without
        an acceptor the worker would be deaf for good."""
        sock: socket.socket | None = None
        try:
            sock, _ = listener.accept()
            self._welcome(PeerLink(sock, "caller"))
        except BlockingIOError:  # the caller has gone again
            return
        except Exception as error:  # noqa: BLE001  # out of descriptors, threads or memory
            log.warning("peers.accept_failed", extra={"error": f"{type(error).__name__}: {error}"})
            if sock is not None:
                sock.close()
            time.sleep(_ACCEPT_RETRY_S)

    def _welcome(self, link: PeerLink) -> None:
        """Raises RuntimeError where no thread can be had; the link is forgotten then."""
        thread = threading.Thread(
            target=self._serve, args=[link], name=f"peer-{self._worker_id}", daemon=True
        )
        pushed: PeerLink | None = None
        with self._lock:
            if self._closing:
                link.close()
                return
            if len(self._strangers) >= STRANGERS_MAX:
                pushed = next(iter(self._strangers))
                del self._strangers[pushed]
            self._links[link] = thread
            self._strangers[link] = None
        if pushed is not None:
            pushed.close()
        try:
            thread.start()
        except BaseException:
            self._forget(link)
            raise

    def _forget(self, link: PeerLink) -> None:
        with self._lock:
            self._links.pop(link, None)
            self._strangers.pop(link, None)
            self._friends.discard(link)

    def _serve(self, link: PeerLink) -> None:
        topic = ""
        try:
            topic, handler = self._admit(link)
            handler(link, link.recv(HELLO_S))
        except PeerLost as error:
            log.info("peers.gone", extra={"topic": topic, "error": str(error)})
            link.refuse(str(error))  # it may be another peer that the handler has lost
        except Exception as error:
            log.exception("peers.handler_failed", extra={"topic": topic})
            link.refuse(f"{type(error).__name__}: {error}")
        finally:
            link.close()
            self._forget(link)

    def _admit(self, link: PeerLink) -> tuple[str, Handler]:
        """Raises PeerLost, with words for the caller, where it is not let in."""
        challenge = os.urandom(32)
        link.send(challenge)
        payload, fds = link.recv_fds(HANDSHAKE_S, bytes_max=CALL_BYTES_MAX)
        close_all(fds)
        with contextlib.suppress(msgspec.DecodeError):
            call = msgspec.msgpack.decode(payload, type=Call)
            proof = proof_of(self._secret, challenge, call.topic)
            if hmac.compare_digest(proof, call.proof):
                with self._lock:
                    handler = self._handlers.get(call.topic)
                    full = len(self._friends) >= self._connections_max
                    if handler is not None and not full:
                        self._strangers.pop(link, None)
                        self._friends.add(link)
                if handler is None:
                    raise PeerLost(f"nobody offers {call.topic} here")
                if full:
                    raise PeerLost("too many connections: try again later")
                link.peer = f"caller of {call.topic}"
                link.send(b"")
                return call.topic, handler
        raise PeerLost("the secret is wrong")
