"""The Amazon SQS and SNS adapter of unibus.

The client library is imported with the adapter, not with the package: plans and profiles need none.
"""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from unibus_sqs.adapter import SqsAdapter

__all__ = ["SqsAdapter"]


def __getattr__(name: str) -> Any:
    if name == "SqsAdapter":
        from unibus_sqs.adapter import SqsAdapter

        return SqsAdapter
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
