"""Checks of the broker: present, reachable, and fit for what we send."""

from deploy import broker
from deploy.config import Topology
from deploy.finding import Finding, failed, ok, warned
from shared.errors import BusUnavailable, ConfigInvalid

VERSION_MIN = (2, 10)


def check_binary(topology: Topology) -> list[Finding]:
    if not topology.broker_embedded:
        return []
    try:
        return [ok("broker", f"embedded: {broker.find_binary()}")]
    except ConfigInvalid as error:
        return [failed("broker", "nats-server is not installed", error.remedy)]


async def check_broker(topology: Topology, running_url: str) -> list[Finding]:
    """Ask the broker that serves, or that should serve, what it can do."""
    url = running_url or ("" if topology.broker_embedded else topology.bus.url)
    if not url:
        return [ok("broker", "starts with `oserve up`, JetStream and payload cap from nats.conf")]
    try:
        info = await broker.ask_info(url)
    except BusUnavailable as error:
        remedy = (
            "start it (nats-server -js), correct bus.url, or unset bus.url for the embedded one"
        )
        return [failed("broker", str(error), remedy)]
    return [
        _version(info),
        _jetstream(info),
        _payload(info),
        *_authentication(info, topology),
    ]


def _version(info: broker.BrokerInfo) -> Finding:
    numbers = tuple(int(part) for part in info.version.split(".")[:2] if part.isdecimal())
    if numbers < VERSION_MIN:
        remedy = f"use {'.'.join(map(str, VERSION_MIN))} or newer"
        return warned("broker", f"nats-server {info.version} is older than we test with", remedy)
    return ok("broker", f"nats-server {info.version} answers")


def _jetstream(info: broker.BrokerInfo) -> Finding:
    if info.jetstream:
        return ok("JetStream", "enabled")
    remedy = "start nats-server with -js, or a jetstream block as in deploy/nats.conf"
    return failed("JetStream", "disabled: plan and journal have no home", remedy)


def _payload(info: broker.BrokerInfo) -> Finding:
    text = f"max_payload is {info.max_payload / 2**20:.1f} MiB"
    if info.max_payload >= broker.PAYLOAD_BYTES_MIN:
        return ok("payload cap", text)
    least = broker.PAYLOAD_BYTES_MIN >> 20
    remedy = f"set max_payload: {2 * least}MB (at least {least}MB) in the broker's configuration"
    return failed("payload cap", f"{text}: long prompts will be refused", remedy)


def _authentication(info: broker.BrokerInfo, topology: Topology) -> list[Finding]:
    if not info.auth_required or topology.bus.user:
        return []
    remedy = "set bus.user, and bus.password as OSERVE_BUS__PASSWORD"
    return [failed("broker", "it asks for a user and a password", remedy)]
