"""Machines, what runs on them, and what should. Frozen snapshots that travel the fabric."""

from __future__ import annotations

from typing import Any, Literal

import msgspec

from springtide.core.engine_api import EngineLoad

PrivacyClass = Literal["trusted", "any"]
NodeState = Literal["ready", "draining"]
ReplicaState = Literal["starting", "ready", "draining", "failed"]


class Device(msgspec.Struct, frozen=True, kw_only=True):
    """A card, or the CPU. `memory` in bytes."""

    kind: str
    name: str
    memory: int
    cores: int = 0


class Node(msgspec.Struct, frozen=True, kw_only=True):
    """A machine that joined, as it describes itself in each heartbeat (`beat`, unix seconds)."""

    id: str
    region: str = "local"
    site: str = "local"
    state: NodeState = "ready"
    devices: list[Device] = []
    trusted: bool = True
    rtt_ms: float | None = None
    version: str = ""
    beat: float = 0.0


class Replica(msgspec.Struct, frozen=True, kw_only=True):
    """One running engine of one model, as it describes itself in each heartbeat.

    `by_turn`: it is full and others wait for it: a request may come only on a turn that the replica grants.
    """

    id: str
    node: str
    model: str
    engine: str
    state: ReplicaState
    deployment: str = ""
    region: str = "local"
    site: str = "local"
    context_length: int = 0
    max_num_seqs: int = 0
    numerics: str = ""
    frame_version: int = 1
    load: EngineLoad = EngineLoad()
    by_turn: bool = False
    error: str | None = None
    started: float = 0.0
    beat: float = 0.0


class Gateway(msgspec.Struct, frozen=True, kw_only=True):
    """A public edge, as it describes itself in each heartbeat."""

    id: str
    url: str
    region: str = "local"
    started: float = 0.0
    beat: float = 0.0


class Deployment(msgspec.Struct, frozen=True, kw_only=True):
    """What should run. `source` is a model source (`pypi:`, `hf:`, a path) or `mock`; `options` go to the
    engine. The name is what clients call `model`."""

    name: str
    source: str
    engine: str = "springtide"
    replicas: int = 1
    options: dict[str, Any] = {}


class DesiredReplica(msgspec.Struct, frozen=True, kw_only=True):
    """One replica that a node should run."""

    id: str
    deployment: str
    model: str
    source: str
    engine: str
    options: dict[str, Any] = {}


class DesiredState(msgspec.Struct, frozen=True, kw_only=True):
    """All that one node should run, whole each time: a lost message costs nothing. `revision` only grows."""

    node: str
    revision: int
    replicas: list[DesiredReplica] = []
    drain: bool = False


class Tenant(msgspec.Struct, frozen=True, kw_only=True):
    """Who pays. `weight` is the share under load; `privacy` says on whose nodes prompts may run."""

    id: str
    name: str
    weight: float = 1.0
    privacy: PrivacyClass = "trusted"


class KeyRecord(msgspec.Struct, frozen=True, kw_only=True):
    """What a gateway knows of an API key: never the key itself, only its hash (SHA-256, hex)."""

    id: str
    hash: str
    tenant: Tenant
    revoked: bool = False
