"""Talking to engines: an HTTP/1.1 client on `asyncio.Protocol`, server-sent events, retries."""
