"""10,000 messages and three faults on a Kafka of its own: nothing is lost, and what is repeated has a cause."""

from pathlib import Path

import pytest
from tests.integration.chaos_kit import judged

pytestmark = pytest.mark.timeout(600)


async def test_ten_thousand_messages_under_three_faults(tmp_path: Path) -> None:
    await judged("kafka", ["consumer-killed", "cut", "broker-killed"], tmp_path)
