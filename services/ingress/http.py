"""The HTTP edge: OpenAI's endpoints, health, metrics. Every answer says who served it and what
the mesh added."""

import asyncio
import logging
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field

from aiohttp import web
from aiohttp.http_exceptions import HttpProcessingError

from services.ingress.admission import Admission
from services.ingress.config import IngressConfig
from services.ingress.exchange import SlowClient, Streamed, StreamedChoice, Whole, WholeChoice
from services.ingress.gateway import Gateway
from services.ingress.journey import Journey
from services.ingress.openai_api import ParsedRequest, parse_chat, parse_completion
from services.ingress.openai_errors import (
    ApiError,
    body_too_large,
    internal_error,
    invalid_request,
    method_not_allowed,
    overloaded,
    unknown_url,
)
from services.ingress.openai_format import ResponseHead, model_entry, model_list
from services.ingress.record import Recorder
from services.ingress.sse import SseResponse, wait_with_comments
from shared.service import ServiceContext

log = logging.getLogger("oserve.http")


@dataclass(slots=True)
class Seen:
    """What every answer to a request must tell."""

    request_id: str
    arrived_s: float
    journeys: list[Journey] = field(default_factory=list[Journey])
    stream: SseResponse | None = None  # once begun, it is too late for another status


SEEN = web.RequestKey("seen", Seen)
Parse = Callable[[bytes], ParsedRequest]
Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]


class HttpEdge:
    def __init__(
        self,
        config: IngressConfig,
        context: ServiceContext,
        gateway: Gateway,
        admission: Admission,
    ) -> None:
        self._config, self._context = config, context
        self._gateway, self._admission = gateway, admission
        self._clock = context.clock
        self._record = Recorder(context, gateway)
        self._started_unix_s = int(context.clock.unix_s())
        self._draining = False

    def drain(self) -> None:
        """Refuse what is new, also on connections that are open already."""
        self._draining = True

    def app(self) -> web.Application:
        app = web.Application(
            middlewares=[self._errors], client_max_size=self._config.body_bytes_max
        )
        app.router.add_post("/v1/completions", self._completions)
        app.router.add_post("/v1/chat/completions", self._chat)
        app.router.add_get("/v1/models", self._models)
        app.router.add_get("/v1/models/{model:.+}", self._model)
        app.router.add_get("/health", self._health)
        app.router.add_get("/ready", self._ready)
        app.router.add_get("/metrics", self._metrics)
        return app

    async def _completions(self, request: web.Request) -> web.StreamResponse:
        return await self._serve(request, parse_completion, "cmpl")

    async def _chat(self, request: web.Request) -> web.StreamResponse:
        return await self._serve(request, parse_chat, "chatcmpl")

    async def _serve(self, request: web.Request, parse: Parse, prefix: str) -> web.StreamResponse:
        arrived_s = self._clock.now_s()
        request_id = self._context.ids.next(prefix)
        request[SEEN] = Seen(request_id, arrived_s)
        if self._draining:
            raise overloaded("This ingress is about to end: retry at once, on a new connection.")
        identity = self._admission.authenticate(
            request.headers.get("Authorization"), request.headers.get("x-oserve-slo-class")
        )
        parsed = parse(await self._body(request))
        if self._gateway.core.open_requests + parsed.num_choices > self._config.open_requests_max:
            raise overloaded(f"{self._config.open_requests_max} requests are open: retry later.")
        journeys, prompt_tokens = await self._admission.journeys(
            parsed, identity, request_id=request_id, now_s=arrived_s
        )
        head = ResponseHead(
            kind=parsed.kind,
            response_id=request_id,
            model=parsed.model,
            created_unix_s=int(time.time()),
        )
        span = self._context.tracing.start(request.path, request.headers)
        if span is not None:
            span.set_attribute("oserve.request_id", request_id)
        headers = self._context.tracing.headers(span) if span is not None else None
        try:
            if parsed.stream:
                return await self._stream(request, parsed, journeys, head, prompt_tokens, headers)
            return await self._whole(request, parsed, journeys, head, prompt_tokens, headers)
        finally:
            for journey in journeys:
                if journey.live:  # the client went away, or another choice failed
                    self._gateway.abort(journey.request_id)
                self._record.ended(journey)
            if span is not None:
                span.end()

    async def _body(self, request: web.Request) -> bytes:
        try:
            async with asyncio.timeout(self._config.body_s):
                return await request.read()
        except TimeoutError:
            raise invalid_request(
                f"The body did not arrive within {self._config.body_s:g} s."
            ) from None
        except web.HTTPRequestEntityTooLarge:
            raise body_too_large(self._config.body_bytes_max) from None
        except (web.RequestPayloadError, HttpProcessingError) as error:
            raise invalid_request(f"The body is not well-formed HTTP: {error}") from None

    async def _whole(
        self,
        request: web.Request,
        parsed: ParsedRequest,
        journeys: list[Journey],
        head: ResponseHead,
        prompt_tokens: int,
        trace_headers: dict[str, str] | None,
    ) -> web.StreamResponse:
        whole = Whole(num_choices=len(journeys))
        choices: list[WholeChoice] = []
        tokenizer = self._admission.models.named(parsed.model).tokenizer
        for index, journey in enumerate(journeys):
            choice = WholeChoice(whole, journey, index=index, parsed=parsed, tokenizer=tokenizer)
            choices.append(choice)
            self._gateway.open(journey, choice, trace_headers)
        request[SEEN].journeys = journeys
        await whole.done
        return web.Response(
            body=whole.body(head, choices, prompt_tokens=prompt_tokens),
            content_type="application/json",
            headers=self._answer_headers(request),
        )

    async def _stream(
        self,
        request: web.Request,
        parsed: ParsedRequest,
        journeys: list[Journey],
        head: ResponseHead,
        prompt_tokens: int,
        trace_headers: dict[str, str] | None,
    ) -> web.StreamResponse:
        request[SEEN].journeys = journeys
        response = SseResponse(request, lambda: self._answer_headers(request))
        request[SEEN].stream = response
        stream = Streamed(
            head,
            response,
            num_choices=len(journeys),
            usage_for=prompt_tokens if parsed.include_usage else None,
            buffer_bytes_max=self._config.client_buffer_bytes_max,
        )
        tokenizer = self._admission.models.named(parsed.model).tokenizer
        for index, journey in enumerate(journeys):
            choice = StreamedChoice(
                stream, journey, index=index, parsed=parsed, tokenizer=tokenizer
            )
            self._gateway.open(journey, choice, trace_headers)
        try:
            await wait_with_comments(stream, journeys, every_s=self._config.sse_comment_s)
        except ApiError as error:
            if not response.begun:
                raise
            self._record.refused(request.path, error)
        except SlowClient:
            log.warning("client.slow", extra={"request_id": head.response_id})
            response.abort()
        return response

    def _answer_headers(self, request: web.Request) -> dict[str, str]:
        now_s = self._clock.now_s()
        seen = request.get(SEEN) or Seen(self._context.ids.next("req"), now_s)
        overheads_s = [journey.overhead_s(now_s) for journey in seen.journeys]
        overhead_s = max(overheads_s, default=now_s - seen.arrived_s)
        replicas = ",".join(dict.fromkeys(j.replica_id for j in seen.journeys))
        return {
            "x-request-id": seen.request_id,
            "x-oserve-replica": replicas or "-",
            "x-oserve-overhead-ms": f"{overhead_s * 1e3:.2f}",
        }

    @web.middleware
    async def _errors(self, request: web.Request, handler: Handler) -> web.StreamResponse:
        try:
            return await handler(request)
        except ApiError as error:
            api_error = error
        except web.HTTPMethodNotAllowed as error:
            allowed = ", ".join(sorted(error.allowed_methods))
            api_error = method_not_allowed(request.method, request.path, allowed)
        except web.HTTPNotFound:
            api_error = unknown_url(request.method, request.path)
        except (ConnectionError, asyncio.CancelledError):
            raise
        except Exception:
            seen = request.get(SEEN)
            log.exception("request.broken", extra={"request_id": seen.request_id if seen else ""})
            if seen is not None and seen.stream is not None and seen.stream.begun:
                seen.stream.abort()  # a second head would be read as part of the stream
                raise ConnectionResetError from None
            api_error = internal_error("The ingress failed; its log has the cause.")
        self._record.refused(request.path, api_error)
        answer = web.Response(
            status=api_error.status,
            body=api_error.body(),
            content_type="application/json",
            headers=self._answer_headers(request) | api_error.headers(),
        )
        if self._draining:
            answer.force_close()
        return answer

    def _json(self, request: web.Request, body: bytes, status: int = 200) -> web.Response:
        return web.Response(
            status=status,
            body=body,
            content_type="application/json",
            headers=self._answer_headers(request),
        )

    async def _models(self, request: web.Request) -> web.Response:
        self._admission.authenticate(request.headers.get("Authorization"), None)
        ids = self._admission.models.ids
        return self._json(request, model_list(ids, created_unix_s=self._started_unix_s))

    async def _model(self, request: web.Request) -> web.Response:
        self._admission.authenticate(request.headers.get("Authorization"), None)
        model = self._admission.models.named(request.match_info["model"]).spec
        return self._json(request, model_entry(model.model_id, created_unix_s=self._started_unix_s))

    async def _health(self, request: web.Request) -> web.Response:
        return self._json(request, b'{"status":"alive"}')

    async def _ready(self, request: web.Request) -> web.Response:
        cause = "this ingress is about to end" if self._draining else self._gateway.not_ready()
        if cause:
            return self._json(request, b'{"status":"not ready","cause":"%b"}' % cause.encode(), 503)
        return self._json(request, b'{"status":"ready"}')

    async def _metrics(self, request: web.Request) -> web.Response:
        return web.Response(
            body=self._context.metrics.render(),
            headers={"Content-Type": "text/plain; version=0.0.4"} | self._answer_headers(request),
        )
