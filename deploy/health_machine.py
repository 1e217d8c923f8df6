"""Checks of the machine: ports, folders, limits, clock."""

import os
import resource
import shutil
import time
from pathlib import Path
from urllib.parse import urlsplit

from deploy import broker
from deploy.config import Topology
from deploy.finding import Finding, failed, ok, warned
from deploy.ports import require_free
from deploy.state import is_locked, read_mesh_file
from shared.errors import ConfigInvalid

OPEN_FILES_MIN = 1024  # below, a few hundred streams exhaust them
OPEN_FILES_GOOD = 16_384
DISK_BYTES_MIN = 256 << 20
DISK_BYTES_GOOD = 2 << 30  # the journal's and the logs' bounds together


def check_port(topology: Topology) -> list[Finding]:
    """The port of each ingress must be free, unless this very mesh holds it."""
    if topology.http_port == 0:
        return [ok("HTTP port", "any free one")]
    data_dir = topology.data_dir
    mesh = read_mesh_file(data_dir) if is_locked(data_dir) else None
    ours = urlsplit(mesh.url).port if mesh is not None else None
    findings: list[Finding] = []
    for port in range(topology.http_port, topology.http_port + topology.up.ingresses):
        if ours is not None and ours <= port < ours + topology.up.ingresses:
            findings.append(ok("HTTP port", f"{port} is this mesh's, which runs"))
            continue
        try:
            require_free(topology.http_host, port, field="port", remedy="")
            findings.append(ok("HTTP port", f"{port} is free"))
        except ConfigInvalid as error:
            text = f"{port} is {error.remedy.rstrip('; ')}"
            remedy = f"stop that, or serve elsewhere: oserve up --port {port + 1}"
            findings.append(failed("HTTP port", text, remedy))
    return findings


def check_data_dir(topology: Topology) -> list[Finding]:
    """It must be writable, and what lies in it must not be a dead mesh's."""
    data_dir = topology.data_dir
    if is_locked(data_dir):
        mesh = read_mesh_file(data_dir)
        who = f"pid {mesh.pid}, {mesh.url}" if mesh is not None else "it is starting"
        return [ok("data folder", f"{data_dir}: a mesh runs in it ({who})")]
    parent = _existing(data_dir)
    if not parent.is_dir() or not os.access(parent, os.W_OK | os.X_OK):
        remedy = "give up.data_dir a folder that you may write"
        return [failed("data folder", f"{parent} cannot be written", remedy)]
    left = read_mesh_file(data_dir)
    if left is not None:
        text = f"{data_dir}/mesh.json is a dead mesh's (pid {left.pid}): it was killed"
        return [warned("data folder", text, "nothing to do: the next `oserve up` replaces it")]
    return [ok("data folder", f"{data_dir} can be written")]


def check_disk(topology: Topology) -> list[Finding]:
    free = shutil.disk_usage(_existing(topology.data_dir)).free
    text = f"{free / 2**30:.1f} GiB free for {topology.data_dir}"
    remedy = "free some, or put up.data_dir on another disk"
    if free < DISK_BYTES_MIN:
        return [failed("disk", text, remedy)]
    if free < DISK_BYTES_GOOD:
        return [warned("disk", text, remedy)]
    return [ok("disk", text)]


def check_open_files(_topology: Topology) -> list[Finding]:
    """Each connection is a descriptor; a process that has none left refuses clients."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft == resource.RLIM_INFINITY or soft >= OPEN_FILES_GOOD:
        return [ok("open files", f"ulimit -n is {soft if soft >= 0 else 'unlimited'}")]
    wanted = OPEN_FILES_GOOD if hard == resource.RLIM_INFINITY else min(OPEN_FILES_GOOD, hard)
    text = f"ulimit -n is {soft}: so many connections at most"
    remedy = f"ulimit -n {wanted} before `oserve up` (hard limit: {hard})"
    level = failed if soft < OPEN_FILES_MIN else warned
    return [level("open files", text, remedy)]


def check_clock(_topology: Topology) -> list[Finding]:
    """A clock before our own files' time breaks TLS, tokens and the journal's age limit."""
    installed_s = broker.CONFIG.stat().st_mtime
    now = time.strftime("%Y-%m-%d %H:%M UTC", time.gmtime())
    if time.time() < installed_s:
        return [failed("clock", f"it says {now}, before we were installed", "set it, or run NTP")]
    return [ok("clock", now)]


def _existing(path: Path) -> Path:
    """``path``, or its nearest parent that exists."""
    path = path.absolute()
    return next(parent for parent in (path, *path.parents) if parent.exists())
