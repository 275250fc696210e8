"""Enums of the protos as lower-case words: SCOPE_ORGANISATION is `organisation`."""

from typing import Annotated, Any, Literal

from pydantic import BeforeValidator

from helixflow.rpc.generated.auth_v1 import metering_pb2

ScopeWord = Literal["installation", "organisation", "project", "user", "key"]
BudgetScopeWord = Literal["organisation", "project", "key"]
MetricWord = Literal["requests_per_minute", "tokens_per_minute", "tokens_per_day", "parallel_requests"]
UnitWord = Literal["money", "tokens"]
PeriodWord = Literal["day", "month", "total"]


def number_of(enum: Any, word: str) -> Any:
    """The number of an enum's value in a request."""
    return enum.Value(_prefix(enum) + word.upper())


def words_of(enum: Any) -> frozenset[str]:
    """All words of an enum; the value 0, which says nothing, has none."""
    return frozenset(_word(enum, number) for number in enum.values() if number)


def _shown(enum: Any) -> BeforeValidator:
    return BeforeValidator(lambda value: _word(enum, value) if isinstance(value, int) else value)


def _word(enum: Any, number: int) -> str:
    return str(enum.Name(number)).removeprefix(_prefix(enum)).lower()


def _prefix(enum: Any) -> str:
    return str(enum.Name(0)).removesuffix("UNSPECIFIED")


# In answers: of the proto's numbers.
ShownScope = Annotated[ScopeWord, _shown(metering_pb2.Scope)]
ShownMetric = Annotated[MetricWord, _shown(metering_pb2.Metric)]
ShownUnit = Annotated[UnitWord, _shown(metering_pb2.BudgetUnit)]
ShownPeriod = Annotated[PeriodWord, _shown(metering_pb2.BudgetPeriod)]
