"""``flower-superlink`` with a fence: other machines reach what nodes use, and nothing else.

    python -m federated.superlink --host 0.0.0.0 --port 8000 ...        all options are flower-superlink's

Flower 1.41 answers everything on one port. ``/v1/fleet/`` is what nodes use, and node authentication guards
it. Nothing guards the rest, and it includes ``/v1/control/``: registering nodes, and starting runs, which
execute code on every node. Behind the fence, the rest is for connections from the server's own machine.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from typing import Any

FOR_NODES = "/v1/fleet/"


def fenced(app: Callable) -> Callable:
    """The ASGI application with the fence around it."""

    async def answer(scope: Mapping[str, Any], receive: Callable, send: Callable) -> None:
        if scope["type"] == "lifespan" or scope["path"].startswith(FOR_NODES) or from_here(scope):
            await app(scope, receive, send)
        elif scope["type"] == "http":
            headers = [(b"content-type", b"text/plain")]
            await send({"type": "http.response.start", "status": 403, "headers": headers})
            await send({"type": "http.response.body", "body": b"only from the server's own machine\n"})

    return answer


def from_here(scope: Mapping[str, Any]) -> bool:
    """Whether both ends of the connection have the same address: then both are this machine."""
    client, server = scope.get("client"), scope.get("server")
    return bool(client and server) and client[0] == server[0]


def main() -> None:
    """What flower-superlink does, with the fence around its application. No proxy is believed about where
    a connection comes from."""
    import uvicorn
    from flwr.supercore.http_logging import get_uvicorn_log_config
    from flwr.superlink.cli.flower_superlink import SuperLinkLifespan, _parse_superlink_lifespan_config
    from flwr.superlink.main import create_app

    config = _parse_superlink_lifespan_config()
    uvicorn.run(
        fenced(create_app(config, SuperLinkLifespan)),
        host=config.host,
        port=config.port,
        ssl_keyfile=config.ssl_keyfile,
        ssl_certfile=config.ssl_certfile,
        log_config=get_uvicorn_log_config(logging.INFO),
        proxy_headers=False,
    )


if __name__ == "__main__":
    main()
