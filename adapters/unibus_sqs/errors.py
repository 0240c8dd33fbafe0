"""AWS' and its client's errors, as unibus': one table, used at every edge of the adapter."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from botocore import exceptions as aws

from unibus.errors import (
    AuthenticationFailed,
    ConfigError,
    ConnectionLost,
    LeaseLost,
    MessageTooLarge,
    NotFound,
    PermissionDenied,
    Refused,
    Throttled,
    Timeout,
    TransportError,
    UnibusError,
)
from unibus.translation import common

# By the last part of AWS' error code, which SQS' two protocols spell differently.
_CODES: dict[type[TransportError], str] = {
    NotFound: "QueueDoesNotExist NonExistentQueue NotFound NotFoundException TopicNotFound",
    LeaseLost: "ReceiptHandleIsInvalid MessageNotInflight",
    MessageTooLarge: "BatchRequestTooLong",
    Throttled: (  # the name of a queue that was deleted can't be used for 60 s: QueueDeletedRecently
        "OverLimit RequestThrottled Throttled Throttling ThrottlingException ThrottledException TooManyRequestsException "
        "RequestLimitExceeded KmsThrottled KMSThrottling QueueDeletedRecently InternalError InternalFailure ServiceUnavailable"
    ),
    AuthenticationFailed: (
        "InvalidClientTokenId UnrecognizedClientException SignatureDoesNotMatch InvalidSignatureException "
        "IncompleteSignature InvalidAccessKeyId InvalidSecurity MissingAuthenticationToken ExpiredToken "
        "ExpiredTokenException AuthFailure"
    ),
    PermissionDenied: "AccessDenied AccessDeniedException AuthorizationError KmsAccessDenied KMSAccessDenied OptInRequired",
}
_BY_CODE = {code: kind for kind, codes in _CODES.items() for code in codes.split()}


def by_code(code: str, text: str, doing: str, status: int = 0) -> TransportError:
    """The error of a code. `doing`: what was tried, with the object's name."""
    code = code.rpartition(".")[2].rpartition("#")[2]
    hint = ""
    if (kind := _BY_CODE.get(code)) is AuthenticationFailed:
        hint = "; check the access key (user of the URL, or AWS' own chain), its secret, the clock and the region"
    elif kind is None and "receipt handle" in text.lower():  # InvalidParameterValue: expired, or not to be changed
        kind = LeaseLost
    elif kind is None and "must be shorter than" in text:
        kind = MessageTooLarge
    elif kind is None:
        kind = Throttled if status >= 500 or status == 429 else Refused
    return kind(f"{doing}: {code}: {text}{hint}")


def of_entry(failed: Mapping[str, Any], doing: str) -> TransportError:
    """Of one entry of a batch."""
    status = 0 if failed.get("SenderFault", True) else 500
    return by_code(str(failed.get("Code", "")), str(failed.get("Message", "")), doing, status)


def translate(exc: BaseException, doing: str) -> UnibusError:
    """The error to raise `from exc`. Never called with CancelledError."""
    if (known := common(exc, doing, "AWS", "sqs")) is not None:
        return known
    if isinstance(exc, aws.ClientError):
        error = exc.response.get("Error", {})
        status = int(exc.response.get("ResponseMetadata", {}).get("HTTPStatusCode", 0))
        return by_code(str(error.get("Code", "")), str(error.get("Message", "")), doing, status)
    if isinstance(exc, aws.NoCredentialsError | aws.PartialCredentialsError | aws.CredentialRetrievalError):
        return AuthenticationFailed(
            f"{doing}: no AWS credentials: give access key and secret as user and password, or by AWS' own chain"
        )
    if isinstance(exc, aws.ReadTimeoutError):
        return Timeout(f"{doing}: no answer in time")
    if isinstance(exc, aws.HTTPClientError | aws.ConnectionError | OSError):
        return ConnectionLost(f"{doing}: {type(exc).__name__}; check the region, the endpoint and the network")
    if isinstance(exc, aws.BotoCoreError):
        return ConfigError(f"{doing}: {exc}")
    return Refused(f"{doing}: {type(exc).__name__}")
