"""Wires the router core to the mesh."""

from services.router.config import RouterConfig
from services.router.core import INPUTS, QUERIES, Router
from shared.core import Query
from shared.messages.base import Message
from shared.messages.requests import RouteReply, RouteRequest
from shared.runtime import Wiring
from shared.service import ServiceContext, run


async def serve(config: RouterConfig, context: ServiceContext) -> None:
    """Answer until told to end."""
    config.checked()
    core = Router(config, models=context.mesh.model_ids, instance_id=context.instance_id)

    def refuse(query: Query) -> Message:
        """The answer when more questions wait than the inbox holds."""
        question = query.message
        known = isinstance(question, RouteRequest)
        return RouteReply(
            request_id=question.request_id if known else "",
            attempt=question.attempt if known else 0,
            reason=f"the router's inbox holds {config.inbox_max} messages already",
            failure="overloaded",
            retry_after_s=config.overloaded_retry_s,
        )

    wiring = Wiring(inputs=INPUTS, queries=QUERIES, inbox_max=config.inbox_max, refuse=refuse)
    await run(core, wiring, context)
