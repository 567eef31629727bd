"""A server that answers every request with the same pieces of bytes, as no decent server would."""

from __future__ import annotations

import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer


@dataclass(frozen=True, slots=True)
class Scripted:
    """A running server and the requests it was sent."""

    url: str
    bodies: list[bytes]


@contextmanager
def scripted(pieces: Sequence[bytes], *, status: int = 200, whole: bool = True) -> Iterator[Scripted]:
    """Serves on a free loopback port.

    Args:
        pieces: Sent one after the other; an empty one is silence until the block ends.
        status: Of every answer.
        whole: End the body as HTTP wants it, or hang up in the middle.
    """
    over = threading.Event()
    bodies: list[bytes] = []

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_POST(self) -> None:
            bodies.append(self.rfile.read(int(self.headers["Content-Length"])))
            self.send_response(status)
            self.send_header("Content-Type", "text/event-stream")
            self.send_header("Transfer-Encoding", "chunked")
            self.send_header("Connection", "close")  # so that no request goes to a connection that is on its way out
            self.end_headers()
            for piece in pieces:
                if not piece:
                    over.wait(60)
                    break
                self.wfile.write(b"%x\r\n%s\r\n" % (len(piece), piece))
                self.wfile.flush()
            if whole:
                self.wfile.write(b"0\r\n\r\n")
            self.close_connection = True

        def log_message(self, format: str, *args: object) -> None:
            pass

        def handle(self) -> None:
            with suppress(ConnectionError):  # the client had enough
                super().handle()

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    try:
        yield Scripted(f"http://127.0.0.1:{server.server_port}", bodies)
    finally:
        over.set()
        server.shutdown()
        thread.join()
        server.server_close()
