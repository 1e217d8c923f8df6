"""Who the worker is, and the messages it signs."""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from services.worker.engine.interface import EngineLoad
from services.worker.events import MeasuredEngine
from services.worker.replica import Ending, Hosted, LiveRequest
from shared.core import Publish
from shared.hardware import GpuSpec
from shared.messages.replicas import ReplicaReport, WorkerReport
from shared.messages.requests import TokenChunk, TokenChunks
from shared.placement.sheets import ModelShape
from shared.subjects import TOKEN_CHUNKS, WORKER_REPORT

NOT_MEASURED = MeasuredEngine(replica_id="", generation=0, load=EngineLoad())


@dataclass(frozen=True, slots=True, kw_only=True)
class WorkerIdentity:
    """``incarnation`` is new in each run of the process: what a former run had accepted is lost,
    and whoever sees the change knows. ``peer`` and ``shapes`` as in WorkerReport. ``followers``:
    ranks other than the leading one have a part of the engine, too."""

    worker_id: str
    incarnation: str
    node_id: str
    gpu: GpuSpec
    models: tuple[str, ...]
    peer: str = ""
    shapes: tuple[ModelShape, ...] = ()
    followers: bool = False

    def chunks(
        self,
        ingress_id: str,
        *,
        replica_id: str,
        chunks: Iterable[TokenChunk] = (),
        signed: bool = False,
    ) -> Publish:
        """One message to an ingress. ``signed``: it says at which worker the chunks' attempts are
        aborted, which an ingress does not know of those that were taken over."""
        message = TokenChunks(
            replica_id=replica_id,
            incarnation=self.incarnation,
            chunks=list(chunks),
            worker_id=self.worker_id if signed else "",
        )
        return TOKEN_CHUNKS.send(message, ingress_id=ingress_id)

    def heartbeat(self, ingress_id: str, *, replica_id: str) -> Publish:
        """A sign of life without chunks. Signed, in case that the acknowledgement of a request
        that was taken over is lost."""
        return self.chunks(ingress_id, replica_id=replica_id, signed=True)

    def acknowledgements(
        self, requests: Iterable[LiveRequest], *, replica_id: str
    ) -> Iterator[Publish]:
        """Tells the ingresses of ``requests`` that these run here now."""
        by_ingress: dict[str, list[TokenChunk]] = {}
        for request in requests:
            chunk = TokenChunk(request_id=request.request_id, attempt=request.attempt)
            by_ingress.setdefault(request.ingress_id, []).append(chunk)
        for ingress_id, chunks in by_ingress.items():
            yield self.chunks(ingress_id, replica_id=replica_id, chunks=chunks, signed=True)

    def endings(
        self, requests: Iterable[LiveRequest], ending: Ending, *, replica_id: str
    ) -> Iterator[Publish]:
        """The last chunks of ``requests``, one message for each ingress."""
        by_ingress: dict[str, list[TokenChunk]] = {}
        for request in requests:
            chunk = ending.chunk(request_id=request.request_id, attempt=request.attempt)
            by_ingress.setdefault(request.ingress_id, []).append(chunk)
        for ingress_id, chunks in by_ingress.items():
            yield self.chunks(ingress_id, replica_id=replica_id, chunks=chunks)

    def worker_report(self, hosted: Iterable[Hosted], *, leaving: bool, number: int) -> Publish:
        report = WorkerReport(
            worker_id=self.worker_id,
            incarnation=self.incarnation,
            node_id=self.node_id,
            gpu=self.gpu,
            models=self.models,
            replicas=tuple(replica.snapshot() for replica in hosted),
            leaving=leaving,
            peer=self.peer,
            shapes=self.shapes,
            number=number,
        )
        return WORKER_REPORT.send(report, worker_id=self.worker_id)

    def replica_report(self, hosted: Hosted) -> ReplicaReport:
        """Its load as last measured; zero until then."""
        measured = hosted.measured or NOT_MEASURED
        load = measured.load
        return ReplicaReport(
            replica_id=hosted.spec.replica_id,
            worker_id=self.worker_id,
            incarnation=self.incarnation,
            epoch=hosted.epoch,
            phase=hosted.phase,
            running=load.running,
            waiting=load.waiting,
            tokens_pending=load.tokens_pending,
            kv_blocks_used=load.kv_blocks_used,
            kv_blocks_total=load.kv_blocks_total,
            running_max=measured.running_max,
            waiting_max=measured.waiting_max,
            output_tokens_total=measured.output_tokens_total,
            requests_total=measured.requests_total,
            step_s=measured.step_s,
        )
