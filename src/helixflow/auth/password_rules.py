"""Which passwords may be chosen (NIST SP 800-63B: long enough, and none that others would try first)."""

from typing import Final

from helixflow.auth.common_passwords import CommonPasswords
from helixflow.auth.texts import email_key
from helixflow.core.errors import ErrorKind, HelixError

# Shorter names stand in too many words to mean anything.
_LEAST_TELLING_CHARS: Final = 4


class PasswordRules:
    """No rules of composition: they make passwords worse. `minimum` characters, unlike one's own name, not common."""

    def __init__(self, minimum: int, common: CommonPasswords) -> None:
        self._minimum = minimum
        self._common = common

    def check(self, password: str, *, email: str, name: str, param: str = "password") -> None:
        """Takes milliseconds the first time, from then on microseconds. `password` is normalised.

        Raises `HelixError` UNPROCESSABLE (`param`), which never repeats the password.
        """
        if len(password) < self._minimum:
            raise _refusal(f"A password has at least {self._minimum} characters.", param)
        folded = email_key(password)
        local = email_key(email).partition("@")[0]
        own = {email_key(email), local, email_key(name), "".join(email_key(name).split())}
        for word in own:
            if len(word) >= _LEAST_TELLING_CHARS and _is_little_more_than(folded, word):
                raise _refusal("A password is not one's own name or e-mail.", param)
        if len(set(folded)) <= 2 or password in self._common:
            raise _refusal("This password is one of those that are tried first. Choose another one.", param)


def _is_little_more_than(password: str, word: str) -> bool:
    """Whether only a few characters are left without the word."""
    return word in password and len(password.replace(word, "")) < _LEAST_TELLING_CHARS


def _refusal(message: str, param: str) -> HelixError:
    return HelixError(ErrorKind.UNPROCESSABLE, message, param=param)
