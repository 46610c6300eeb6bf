"""Files for a browser: one that was looked up by its name, in pieces, also from the middle on.

A download may take longer than a proxy lets one answer take: browsers go on with a range of bytes.
"""

from __future__ import annotations

import io
import os
import re
from collections.abc import AsyncIterator, Mapping
from pathlib import Path
from urllib.parse import quote

from anyio import to_thread
from starlette.responses import Response, StreamingResponse

from trainer.storage.read import open_unlinked

PIECE = 1 << 18  # bytes
_RANGE = re.compile(r"bytes=(\d{0,15})-(\d{0,15})")


async def file_response(path: Path, headers: Mapping[str, str], *, media_type: str, method: str = "GET") -> Response:
    """The file, or the range of it that the request's `headers` ask for; 404 for a link, a folder or nothing.

    `method`: for HEAD the headers alone, and nothing is read.
    """
    try:
        file = await to_thread.run_sync(open_unlinked, path)
    except OSError:
        return Response("There is no such file.\n", 404)
    found = os.fstat(file.fileno())
    mark = f'"{found.st_mtime_ns:x}-{found.st_size:x}"'
    own = {"Accept-Ranges": "bytes", "ETag": mark}
    if media_type != "image/png":
        own["Content-Disposition"] = f"attachment; filename*=utf-8''{quote(path.name)}"
    if headers.get("if-none-match") == mark:
        file.close()
        return Response(status_code=304, headers=own)
    first, last = 0, found.st_size - 1
    status = 200
    asked = headers.get("range", "")
    if asked and headers.get("if-range", mark) == mark:
        chosen = asked_range(asked, found.st_size)
        if chosen is None:
            file.close()
            return Response(status_code=416, headers={"Content-Range": f"bytes */{found.st_size}"})
        first, last = chosen
        status = 206
        own["Content-Range"] = f"bytes {first}-{last}/{found.st_size}"
    own["Content-Length"] = str(last - first + 1)
    if method == "HEAD":
        file.close()
        return Response(status_code=status, headers=own, media_type=media_type)
    return StreamingResponse(_pieces(file, first, last), status, headers=own, media_type=media_type)


def asked_range(text: str, size: int) -> tuple[int, int] | None:
    """The first and the last byte that a Range header asks for; None where it cannot be served."""
    match = _RANGE.fullmatch(text.strip())
    if match is None or not (match[1] or match[2]):
        return None
    if not match[1]:  # the last so many bytes
        first, last = max(0, size - int(match[2])), size - 1
    else:
        first, last = int(match[1]), min(int(match[2] or size - 1), size - 1)
    return (first, last) if first <= last else None


async def _pieces(file: io.BufferedReader, first: int, last: int) -> AsyncIterator[bytes]:
    with file:
        file.seek(first)
        left = last - first + 1
        while left > 0:
            piece = await to_thread.run_sync(file.read, min(PIECE, left))
            if not piece:  # the file has become shorter: the browser sees that bytes are missing
                return
            left -= len(piece)
            yield piece
