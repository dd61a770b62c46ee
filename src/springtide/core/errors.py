"""Every error that a person can meet, as a tree; each knows its HTTP status and its remedy.

SpringtideError             anything that we raise on purpose
├─ SetupError               this machine or its configuration is not right (command line: exit code 1)
└─ RequestError             a client's request can't be done; becomes OpenAI's error object
   ├─ InvalidRequest        400  the request itself is wrong
   │  ├─ ContextTooLong     400  prompt and answer don't fit the model's context
   │  └─ KeyReused          422  the idempotency key belongs to another request
   ├─ Unauthorized          401  no key, a wrong key, a revoked key
   ├─ ModelNotFound         404  no deployment of that name
   ├─ TakenOver             409  another connection of the same client goes on with this answer
   ├─ BodyTooLarge          413  more bytes than we take
   ├─ Overloaded            503  no replica can take it within the deadline
   │  ├─ BacklogTooLong     429  the tenant's own requests fill all the time that there is
   │  └─ GatewayStopping    503  this gateway ends; another one can go on
   ├─ DeadlineExceeded      504  the deadline of the client, or of the platform, has passed
   └─ ReplicaLost           502  replicas were lost, and no other could go on
"""

from __future__ import annotations

import msgspec


class WireError(msgspec.Struct, frozen=True, kw_only=True):
    """A RequestError as it travels from replica to gateway."""

    status: int
    type: str
    code: str | None
    message: str
    param: str | None = None
    retry_after: float | None = None


class SpringtideError(Exception):
    """What happened, and what to do about it (`hint`)."""

    def __init__(self, message: str, *, hint: str | None = None) -> None:
        super().__init__(message)
        self.message = message
        self.hint = hint

    def __str__(self) -> str:
        return f"{self.message} ({self.hint})" if self.hint else self.message


class SetupError(SpringtideError):
    """This machine, its files or its configuration are not right."""


class RequestError(SpringtideError):
    """A request that can't be done. Subclasses set `status`, OpenAI's `type`, and `code`."""

    status = 500
    type = "server_error"
    code: str | None = None

    def __init__(
        self,
        message: str,
        *,
        hint: str | None = None,
        param: str | None = None,
        code: str | None = None,
        retry_after: float | None = None,
    ) -> None:
        super().__init__(message, hint=hint)
        self.param = param
        self.code = code or type(self).code
        self.retry_after = retry_after

    def to_wire(self) -> WireError:
        return WireError(
            status=self.status,
            type=self.type,
            code=self.code,
            message=str(self),
            param=self.param,
            retry_after=self.retry_after,
        )

    @staticmethod
    def from_wire(wire: WireError) -> RequestError:
        """The error as the replica raised it: same status, type, code and words."""
        error = RequestError(wire.message, param=wire.param, code=wire.code, retry_after=wire.retry_after)
        error.status = wire.status
        error.type = wire.type
        return error


class InvalidRequest(RequestError):
    status = 400
    type = "invalid_request_error"


class ContextTooLong(InvalidRequest):
    code = "context_length_exceeded"


class KeyReused(InvalidRequest):
    status = 422
    code = "idempotency_key_reused"


class TakenOver(RequestError):
    status = 409
    type = "conflict_error"
    code = "taken_over"


class Unauthorized(RequestError):
    status = 401
    type = "authentication_error"
    code = "invalid_api_key"


class ModelNotFound(RequestError):
    status = 404
    type = "invalid_request_error"
    code = "model_not_found"


class BodyTooLarge(RequestError):
    status = 413
    type = "invalid_request_error"
    code = "body_too_large"


class Overloaded(RequestError):
    status = 503
    type = "overloaded_error"
    code = "no_capacity"


class BacklogTooLong(Overloaded):
    status = 429
    type = "rate_limit_error"
    code = "backlog_too_long"


class GatewayStopping(Overloaded):
    code = "gateway_stopping"


class DeadlineExceeded(RequestError):
    status = 504
    type = "timeout_error"
    code = "deadline_exceeded"


class ReplicaLost(RequestError):
    status = 502
    type = "server_error"
    code = "replica_lost"
