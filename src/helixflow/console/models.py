"""The bases of all models: what is given in requests, what is shown in answers, and pages of it."""

from typing import Any, Generic, TypeVar

from google.protobuf.message import Message
from pydantic import BaseModel, ConfigDict, Field, model_validator

from helixflow.console.fields import OptionalText


class Given(BaseModel):
    """The body of a request. Types are taken at their word (no `"5"` for 5) and unknown fields refused."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True, hide_input_in_errors=True)

    def given(self) -> dict[str, Any]:
        """The fields that are not null, for an RPC's request, which has no null."""
        return self.model_dump(exclude_none=True)


class Changes(Given):
    """The body of a PATCH: what is absent stays as it is.

    Fields are declared with `absent()`, so that null is refused unless their type has it; read them with `present()`.
    """

    def present(self) -> dict[str, Any]:
        """The fields that were given."""
        return self.model_dump(exclude_unset=True)


def absent(description: str) -> Any:
    """The default of a field of `Changes`. It is not in the schema: no value means the same as leaving it out."""
    return Field(default=None, description=description, json_schema_extra=_drop_default)


def _drop_default(schema: dict[str, Any]) -> None:
    schema.pop("default", None)


class Shown(BaseModel):
    """What an answer holds; validates the message of the RPC, field by field of the same name."""

    model_config = ConfigDict(from_attributes=True, frozen=True, hide_input_in_errors=True)


Item = TypeVar("Item", bound=Shown)


class Page(Shown, Generic[Item]):
    """One page of a list; each kind of list has a subclass, whose name the OpenAPI document shows."""

    data: list[Item] = Field(description="The entries of this page.")
    next_cursor: OptionalText = Field(
        description="Give it as `cursor` to get the next page; null after the last one.",
        examples=["WzE3NjM4MzcxMDAsImtleV8xIl0"],
    )

    @model_validator(mode="before")
    @classmethod
    def _read(cls, value: Any) -> Any:
        """Of the response message: its first field has the entries."""
        if not isinstance(value, Message):
            return value
        entries = getattr(value, value.DESCRIPTOR.fields[0].name)
        return {"data": list(entries), "next_cursor": getattr(value, "next_cursor", "")}
