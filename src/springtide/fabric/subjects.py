"""Every subject and bucket name of the fabric, in one place, and who may use them.

Identifiers of nodes, replicas and gateways become tokens of subjects, so they must hold no dot, space or
wildcard: `check_token` stands at each door.

    st.node.<node>.replica.<replica>.open      gateway -> replica: a request, in parts
    st.node.<node>.replica.<replica>.control   gateway -> replica: acknowledgements, replays, cancels, life-sign
    st.gateway.<gateway>.frames.<node>         replica -> gateway: frames
    st.gateway.<gateway>.explain               gateway -> gateway: what do you know of a request?
    st.node.<node>.renew                       node -> join server: renew my credentials
    st.node.<node>.desired                     node -> controller: what should I run?
    st.join.<token>                            newcomer -> join server: make me a node
    st.presence.gone                           the NATS server cut a connection (see presence)
    st.usage                                   gateway -> USAGE stream
    $KV.<bucket>.<key>                         latest value of each key of a JetStream bucket
"""

from __future__ import annotations

import re

from springtide.core.errors import SetupError

PRESENCE = "presence"
DESIRED = "desired"
DEPLOYMENTS = "deployments"
KEYS = "keys"
INTENTS = "intents"
LEADERS = "leaders"
JOIN_TOKENS = "join_tokens"
MEMBERS = "members"

USAGE_STREAM = "USAGE"
USAGE_SUBJECT = "st.usage"
GONE_SUBJECT = "st.presence.gone"

_TOKEN = re.compile(r"[A-Za-z0-9_-]{1,128}")


def check_token(what: str, value: str) -> str:
    """`value`, if it can be one token of a subject.

    Raises:
        SetupError: it holds anything but letters, digits, `_` and `-`.
    """
    if not _TOKEN.fullmatch(value):
        raise SetupError(
            f"{what} {value!r} can't be used as a name on the fabric",
            hint="use up to 128 letters, digits, '-' and '_'",
        )
    return value


def open_subject(node: str, replica: str) -> str:
    return f"st.node.{node}.replica.{replica}.open"


def control_subject(node: str, replica: str) -> str:
    return f"st.node.{node}.replica.{replica}.control"


def frames_subject(gateway: str, node: str) -> str:
    return f"st.gateway.{gateway}.frames.{node}"


def explain_subject(gateway: str) -> str:
    return f"st.gateway.{gateway}.explain"


def renew_subject(node: str) -> str:
    return f"st.node.{node}.renew"


def desired_subject(node: str) -> str:
    return f"st.node.{node}.desired"


def join_subject(token_id: str) -> str:
    return f"st.join.{token_id}"


def bucket_stream(bucket: str) -> str:
    """The JetStream stream that keeps a bucket."""
    return f"KV_{bucket}"


def bucket_subject(bucket: str, key: str) -> str:
    return f"$KV.{bucket}.{key}"


def direct_get_subject(bucket: str, key: str) -> str:
    """Where to ask for the last value of exactly one key."""
    return f"$JS.API.DIRECT.GET.{bucket_stream(bucket)}.{bucket_subject(bucket, key)}"


def node_inbox(node: str) -> str:
    return f"_INBOX.node.{node}"


def platform_inbox(name: str) -> str:
    return f"_INBOX.platform.{name}"


def join_inbox(token_id: str) -> str:
    return f"_INBOX.join.{token_id}"


def node_may_publish(node: str) -> list[str]:
    """A node speaks for itself and for nobody else. Nothing of JetStream is among it: JetStream answers to any
    subject that the asker names, so a node that may ask could have it write into another's key."""
    return [
        f"st.node.{node}.>",
        frames_subject("*", node),
        bucket_subject(PRESENCE, f"node.{node}"),
        bucket_subject(PRESENCE, f"replica.{node}.>"),
    ]


def node_may_subscribe(node: str) -> list[str]:
    return [f"st.node.{node}.>", bucket_subject(DESIRED, node), f"{node_inbox(node)}.>"]
