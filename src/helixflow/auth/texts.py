"""What names and e-mails may look like. They are kept exactly as given."""

import re
import unicodedata
from typing import Final

from helixflow.core.errors import ErrorKind, HelixError

MAX_NAME_CHARS: Final = 100
MAX_EMAIL_CHARS: Final = 254
# What all mail servers take (RFC 5321, without quotes), and nothing that could mean something else in a header or log.
_EMAIL: Final = re.compile(r"[^\s@\"(),:;<>\[\\\]\x00-\x20\x7f]{1,64}@[^\s@\"(),:;<>\[\\\]\x00-\x20\x7f]{1,189}")


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
