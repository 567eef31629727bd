"""Server-sent events from the bytes of a connection, however these are cut."""

from __future__ import annotations


class EventReader:
    """Puts events together from pieces of a stream.

    Lines are split as bytes, so that neither a character cut in two nor one that merely looks like the end of a line
    inside of a JSON string does any harm. Lines end in LF or CR LF.
    """

    def __init__(self) -> None:
        self._rest = b""  # a line that has not ended
        self._data: list[bytes] = []  # of an event that has not ended

    def feed(self, piece: bytes) -> list[bytes]:
        """The data of the events that this piece completes; comments and other fields are passed over."""
        *lines, self._rest = (self._rest + piece).split(b"\n")
        events: list[bytes] = []
        for line in lines:
            line = line.removesuffix(b"\r")
            if line.startswith(b"data:"):
                self._data.append(line[5:].removeprefix(b" "))
            elif not line and self._data:
                events.append(b"\n".join(self._data))
                self._data.clear()
        return events
