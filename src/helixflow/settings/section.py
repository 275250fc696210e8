"""What all sections of the settings are made of: their base, and the kinds of values that many of them have."""

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Final

from pydantic import BaseModel, ConfigDict, Field

_NAME: Final = r"^[A-Za-z0-9][A-Za-z0-9._:/@+-]*$"
_LABEL: Final = r"^[a-z0-9]([a-z0-9._-]*[a-z0-9])?$"
_AMOUNT: Final = r"^[0-9]{1,7}(\.[0-9]{1,9})?$"
_WEB_ADDRESS: Final = r"^https?://[^\s]+$"
# Patterns in words, for whoever missed them.
SHAPES: Final[Mapping[str, str]] = {
    _NAME: "must be letters, digits and . _ : / @ + -, and begin with a letter or digit",
    _LABEL: "must be lower-case letters, digits and . _ -, and begin and end with a letter or digit",
    _AMOUNT: 'must be dollars as text, such as "0.05", with at most nine decimals',
    _WEB_ADDRESS: "must begin with http:// or https:// and have no spaces",
}

Port = Annotated[int, Field(ge=0, le=65535)]
Seconds = Annotated[float, Field(gt=0, le=86_400)]
Name = Annotated[str, Field(min_length=1, max_length=200, pattern=_NAME)]
Label = Annotated[str, Field(min_length=1, max_length=63, pattern=_LABEL)]
Amount = Annotated[str, Field(pattern=_AMOUNT)]
WebAddress = Annotated[str, Field(pattern=_WEB_ADDRESS)]


class Section(BaseModel):
    """Base of all sections: frozen, and a misspelt key is an error."""

    model_config = ConfigDict(frozen=True, extra="forbid", validate_default=True)


class SecretRef(Section):
    """Where a secret is found: a file, or an environment variable. Never the secret itself."""

    file: Path | None = None
    env: str | None = None

    def read(self) -> str:
        """The secret, stripped. Raises `ValueError` naming the place, never the content."""
        if self.file is not None:
            try:
                text = self.file.expanduser().read_text().strip()
            except OSError as exc:
                raise ValueError(f"cannot read the secret file {self.file}: {exc.strerror}") from exc
            if not text:
                raise ValueError(f"the secret file {self.file} is empty")
            return text
        value = os.environ.get(self.env or "", "").strip()
        if not value:
            raise ValueError(f"the environment variable {self.env} is not set or empty")
        return value
