"""What a request is about, as far as the request itself says."""

from typing import Final, NamedTuple

from google.protobuf.descriptor import MethodDescriptor
from google.protobuf.message import Message

_ID: Final = "id"
# The first one that is given counts.
_FIELDS: Final = (_ID, "user_id", "session_id", "project_id", "owner_id", "organisation_id")
# Ids are shorter; what is longer is none, and is not worth keeping whole.
_MAX_CHARS: Final = 200


class Target(NamedTuple):
    """`kind` is a noun in the singular (`project`), `id` is '' where none is named."""

    kind: str
    id: str


class Targets:
    """Finds the target of requests of one RPC, by its name and by the fields of its request.

    A field `id` is that of what the RPC's own name says: UpdateProject is about a `project`. Other fields say it
    themselves: CreateKey with `project_id` is about that `project`.
    """

    def __init__(self, method: MethodDescriptor, action: str) -> None:
        """`action` is the RPC's name in snake case."""
        self._noun = _singular(action.partition("_")[2] or action)
        self._names = [name for name in _FIELDS if name in method.input_type.fields_by_name]

    def find(self, request: Message) -> Target:
        for name in self._names:
            if given := getattr(request, name)[:_MAX_CHARS]:
                return Target(self._noun if name == _ID else name.removesuffix("_id"), given)
        return Target(self._noun, "")


def _singular(noun: str) -> str:
    return noun.removesuffix("s")
