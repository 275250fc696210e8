"""The words of the admin API for the enums of the protos."""

from typing import Any, get_args

import pytest

from helixflow.console import words
from helixflow.rpc.generated.auth_v1 import metering_pb2


@pytest.mark.parametrize(
    ("enum", "literal"),
    [
        (metering_pb2.Scope, words.ScopeWord),
        (metering_pb2.Metric, words.MetricWord),
        (metering_pb2.BudgetUnit, words.UnitWord),
        (metering_pb2.BudgetPeriod, words.PeriodWord),
    ],
)
def test_there_is_a_word_for_every_value_and_back(enum: Any, literal: Any) -> None:
    assert set(get_args(literal)) == words.words_of(enum)
    assert {words.number_of(enum, word) for word in get_args(literal)} == set(enum.values()) - {0}
