"""``--what-if gpus=24,kind=h200``: the same demand on other hardware, or more of it.

| key | means |
|---|---|
| ``gpus`` | so many GPUs altogether, on nodes like the topology's |
| ``add`` | so many more GPUs, of ``kind`` if that is given, beside those there are |
| ``kind`` | GPUs of this kind: in place of the topology's, or the added ones |
| ``nodes`` | the GPUs spread over so many nodes |
| ``network_gbps`` | a network of so many Gbit/s between nodes |
| ``scale`` | so many times the demand |
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

from loadgen.planning.machine import (
    GBPS,
    GPUS_MAX,
    Site,
    on_nodes,
    plus_gpus,
    with_gpus,
    with_network,
)
from shared.cost.library import gpu_facts
from shared.errors import ConfigInvalid

OPTION = "--what-if"
NUMBER_MAX = 1e9


@dataclass(frozen=True, slots=True, kw_only=True)
class WhatIf:
    """One change; None or "" leaves a thing as it is."""

    text: str
    gpus: int | None = None
    add: int | None = None
    kind: str = ""
    nodes: int | None = None
    network_gbps: float | None = None
    scale: float = 1.0

    def of(self, site: Site, folder: Path) -> Site:
        """The site so changed; ``folder`` holds what cannot be said in a topology, and has to stay
        for as long as the site is used. Raises ConfigInvalid."""
        mesh = site.mesh
        try:
            if self.add is not None:
                mesh = plus_gpus(mesh, self.add, kind=self.kind)
            elif self.gpus is not None or self.kind:
                mesh = with_gpus(mesh, self.gpus or len(mesh.gpus()), kind=self.kind)
            if self.nodes is not None:
                mesh = on_nodes(mesh, self.nodes)
            if self.network_gbps is not None:
                mesh = with_network(mesh, folder, self.network_gbps * GBPS)
        except ConfigInvalid as error:
            raise _wrong(self.text, f"{error.field}: {error.remedy}") from None
        return Site(mesh=mesh, scheduler=site.scheduler)


def parse_what_if(text: str) -> WhatIf:
    """One option's text; raises ConfigInvalid that says what may be written."""
    given: dict[str, str] = {}
    for part in text.split(","):
        key, equals, value = (piece.strip() for piece in part.partition("="))
        if not equals or not value:
            raise _wrong(text, f"write KEY=VALUE for each of: {', '.join(_KEYS)}")
        if key not in _KEYS:
            raise _wrong(text, f"no such key as {key}; there are: {', '.join(_KEYS)}")
        if key in given:
            raise _wrong(text, f"{key} is there twice")
        given[key] = value
    if "gpus" in given and "add" in given:
        raise _wrong(text, "gpus says how many there are, add how many more: use one of them")
    return _made(text, {key: _KEYS[key](value, text, key) for key, value in given.items()})


def _made(text: str, values: Mapping[str, int | float | str]) -> WhatIf:
    def whole(key: str) -> int | None:
        value = values.get(key)
        return None if value is None else int(value)

    network = values.get("network_gbps")
    return WhatIf(
        text=text,
        gpus=whole("gpus"),
        add=whole("add"),
        kind=str(values.get("kind", "")),
        nodes=whole("nodes"),
        network_gbps=None if network is None else float(network),
        scale=float(values.get("scale", 1.0)),
    )


def _whole(value: str, text: str, key: str) -> int:
    if not value.isascii() or not value.isdecimal() or not 1 <= int(value) <= GPUS_MAX:
        raise _wrong(text, f"{key} is a whole number from 1 to {GPUS_MAX}")
    return int(value)


def _positive(value: str, text: str, key: str) -> float:
    try:
        number = float(value)
    except ValueError:
        number = 0.0
    if not 0.0 < number <= NUMBER_MAX:
        raise _wrong(text, f"{key} is a number above 0")
    return number


def _kind(value: str, text: str, key: str) -> str:
    try:
        return gpu_facts(value).gpu
    except ConfigInvalid as error:
        raise _wrong(text, f"{key}: {error.remedy}") from None


def _wrong(text: str, remedy: str) -> ConfigInvalid:
    return ConfigInvalid(field=OPTION, value=text, remedy=remedy)


_KEYS: Mapping[str, Callable[[str, str, str], int | float | str]] = {
    "gpus": _whole,
    "add": _whole,
    "kind": _kind,
    "nodes": _whole,
    "network_gbps": _positive,
    "scale": _positive,
}
