"""Settings of the ingress."""

import msgspec

from shared.slo import SloClass


class IngressConfig(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Bounds and patience of the HTTP edge. Times in seconds."""

    host: str = "127.0.0.1"
    port: int = 8000
    keys_file: str = ""  # TOML with [[keys]]; empty: open to everybody, said at start
    default_slo_class: SloClass = "standard"

    body_bytes_max: int = 4 << 20
    connections_max: int = 20_000
    open_requests_max: int = 8_192  # beyond: 503 with Retry-After
    client_buffer_bytes_max: int = 1 << 20  # unread by a slow client; beyond: aborted
    first_request_s: float = 15.0  # a new connection must have sent a request by then
    body_s: float = 30.0  # a request's body must have arrived by then
    client_read_s: float = 30.0  # unread by its client, and not getting less, for that long: closed
    keepalive_s: float = 75.0
    sse_comment_s: float = 10.0  # a comment keeps proxies from closing a stream that waits

    request_s: float = 600.0  # deadline of a whole request
    route_s: float = 0.5  # no answer from a router: ask again
    first_route_s: float = 15.0  # no replica for a new request in all that time: 503
    accept_s: float = 1.0  # submitted but not acknowledged: try elsewhere
    stall_s: float = 2.0  # neither chunk nor heartbeat from its replica: try elsewhere
    probe_s: float = 5.0  # no chunk for one request while its replica is alive: submit it again
    attempts_max: int = 64
    sweep_s: float = 0.05
    completed_s: float = 0.1  # how often completions are published
    drain_timeout_s: float = 60.0
