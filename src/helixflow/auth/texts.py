"""What names and e-mails may look like. They are kept exactly as given."""

import re
import unicodedata
from typing import Final

from google.protobuf.descriptor import FieldDescriptor
from google.protobuf.message import Message

from helixflow.core.errors import ErrorKind, HelixError

MAX_NAME_CHARS: Final = 100
MAX_EMAIL_CHARS: Final = 254
# What all mail servers take (RFC 5321, without quotes), and nothing that could mean something else in a header or log.
_EMAIL: Final = re.compile(r"[^\s@\"(),:;<>\[\\\]\x00-\x20\x7f]{1,64}@[^\s@\"(),:;<>\[\\\]\x00-\x20\x7f]{1,189}")

_TEXTUAL: Final = (FieldDescriptor.TYPE_STRING, FieldDescriptor.TYPE_MESSAGE)


def check_storable(message: Message) -> None:
    """Raises `HelixError` UNPROCESSABLE for a request with NUL in a text: PostgreSQL neither stores nor compares it."""
    for field, value in message.ListFields():
        single = isinstance(value, str | Message)
        for item in (value,) if single else value if field.type in _TEXTUAL else ():
            if isinstance(item, Message):
                check_storable(item)
            elif "\0" in item:
                raise HelixError(ErrorKind.UNPROCESSABLE, "Texts have no NUL characters.", param=field.name)


def check_name(name: str, param: str = "name", what: str = "A name") -> str:
    """Returns `name`. Raises `HelixError` UNPROCESSABLE unless it has 1 to 100 printable characters, not all spaces."""
    if not 1 <= len(name) <= MAX_NAME_CHARS or not name.isprintable() or not name.strip():
        raise HelixError(
            ErrorKind.UNPROCESSABLE, f"{what} has 1 to {MAX_NAME_CHARS} printable characters.", param=param
        )
    return name


def check_email(email: str, param: str = "email") -> str:
    """Returns `email`. Raises `HelixError` UNPROCESSABLE unless it looks like one."""
    if len(email) > MAX_EMAIL_CHARS or not _EMAIL.fullmatch(email) or not email.isprintable():
        raise HelixError(ErrorKind.UNPROCESSABLE, "An e-mail looks like name@example.com.", param=param)
    return email


def email_key(email: str) -> str:
    """The form under which e-mails are compared: two that differ only in case or composition are the same."""
    return unicodedata.normalize("NFC", unicodedata.normalize("NFC", email).casefold())
