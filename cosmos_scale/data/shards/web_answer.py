"""The answers of web servers, whose end some servers do not tell, and what stands between."""

from collections.abc import Iterator

import requests
from requests.utils import get_environ_proxies, select_proxy

from cosmos_scale.config.section import redact_urls

HTTP_1_0 = 10  # by urllib3's count; its servers close the connection after each answer


def says_its_end(answer: requests.Response) -> bool:
    """Return whether an answer has a length, or pieces with a last one, or ends with its connection."""
    head = answer.headers
    if answer.raw.version == HTTP_1_0 or "close" in head.get("Connection", "").lower():
        return True
    lengths = {length.strip() for length in head.get("Content-Length", "").split(",")}  # one may come several times
    return "chunked" in head.get("Transfer-Encoding", "").lower() or (len(lengths) == 1 and lengths.pop().isdigit())


def first_bytes(answer: requests.Response, size: int, piece_size: int) -> Iterator[bytes]:
    """Yield so many bytes of an answer, or all where it has fewer, and do not wait for its end."""
    left = size
    while left > 0 and (piece := answer.raw.read(min(piece_size, left), decode_content=True)):
        left -= len(piece)
        yield piece


def first_cause(error: BaseException) -> BaseException:
    """Return the error that a chain of errors began with."""
    while error.__context__ is not None:
        error = error.__context__
    return error


def through_proxy(address: str) -> str:
    """Name the proxy that the environment sends requests for an address through, for the end of a sentence."""
    proxy = select_proxy(address, get_environ_proxies(address))
    return f" (through the proxy {redact_urls(proxy)} of the environment)" if proxy else ""
