"""An image's bytes from the web: one time limit for the whole answer, and a bound on its size."""

from __future__ import annotations

import asyncio
import queue
import threading

from ..version import __version__


SECONDS = 60.0
"""How long an answer may take in all, by default."""
MOST_BYTES = 2**27
"""How large an answer may be (128 MiB)."""


def read_url(url: str, seconds: float | None = None) -> bytes:
    """
    What a web server gives for an http or https address. Redirects are followed, to http and https alone.

    Args:
        url (`str`): the address.
        seconds (`float`, *optional*): for everything together: name look-up, connection, redirects and body. Default:
            [`SECONDS`].

    Raises:
        TimeoutError: there is no whole answer by then.
        ValueError: the server says that there is no such thing (404, ...), or sends too much or something compressed.
        httpx.HTTPError, OSError: the server can't be reached or breaks off.
    """
    seconds = SECONDS if seconds is None else seconds
    answers: queue.SimpleQueue[bytes | Exception] = queue.SimpleQueue()

    def ask() -> None:
        try:
            answers.put(asyncio.run(_download(url, seconds)))
        except Exception as error:
            # Of several addresses of a server that were tried at once, say.
            answers.put(error.exceptions[0] if isinstance(error, ExceptionGroup) else error)

    # In a thread of its own: a notebook's has an event loop already, and nothing can cut a name look-up short.
    threading.Thread(target=ask, daemon=True).start()
    try:
        answer = answers.get(timeout=seconds)
    except queue.Empty:
        answer = TimeoutError()
    if isinstance(answer, TimeoutError):
        raise TimeoutError(f"no whole answer within {seconds:g} seconds")
    if isinstance(answer, Exception):
        raise answer
    return answer


async def _download(url: str, seconds: float) -> bytes:
    import httpx

    # Not compressed: an image is so already, and a compressed answer's size is known only once it is unpacked.
    headers = {"User-Agent": f"hf_vs2/{__version__}", "Accept-Encoding": "identity"}
    async with (
        asyncio.timeout(seconds),
        httpx.AsyncClient(follow_redirects=True, timeout=seconds, headers=headers) as client,
        client.stream("GET", url) as response,
    ):
        if not response.is_success:
            raise ValueError(f"the web server answers {response.status_code} {response.reason_phrase}".rstrip())
        if (encoding := response.headers.get("Content-Encoding", "identity")) != "identity":
            raise ValueError(f"the web server sends it compressed ({encoding}), which nobody asked for")
        body = bytearray()
        async for chunk in response.aiter_raw():
            body += chunk
            if len(body) > MOST_BYTES:
                raise ValueError(f"the web server sends more than {MOST_BYTES // 2**20} MiB")
        return bytes(body)
