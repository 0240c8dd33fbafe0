"""The Amazon SQS and SNS adapter of unibus."""

from unibus_sqs.adapter import SqsAdapter

__all__ = ["SqsAdapter"]
