"""Checks that the cost profiles hold what a modelled cluster is to stand for."""

from deploy.config import Topology
from deploy.finding import Finding, failed, ok
from shared.cost.topology import check_profiles
from shared.errors import ConfigInvalid


def check_profiled(topology: Topology) -> list[Finding]:
    """Each model on each kind of GPU, and each replica's shape, if engines are timed by profile."""
    engine = topology.mesh.engine
    if engine.kind != "modelled" or engine.modelled.timing != "profile":
        return []
    try:
        check_profiles(topology.mesh)
    except ConfigInvalid as error:
        return [failed("profiles", f"{error.field} = {error.value!r}", error.remedy)]
    kinds = sorted({node.gpu_kind for node in topology.mesh.nodes})
    names = [model.profile_name for model in topology.mesh.models]
    return [ok("profiles", f"{', '.join(names)} on {', '.join(kinds)}")]
