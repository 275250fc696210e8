"""Decoding of JSON request bodies into typed views, with errors that name the field as the client wrote it."""

import re
from collections.abc import Mapping
from typing import Any, TypeVar

import msgspec

from helixflow.core.errors import ErrorKind, HelixError

Params = TypeVar("Params", bound=msgspec.Struct)

_FIELDS = msgspec.json.Decoder(dict[str, msgspec.Raw])
_LIST = msgspec.json.Decoder(list[msgspec.Raw])
_PATH = re.compile(r" - at (?:`key` in )?`(?:key in )?\$\.?(.*)`$")
_MISSING = re.compile(r"^Object missing required field `(.+?)`")


def decode_fields(body: bytes) -> dict[str, msgspec.Raw]:
    """The top-level fields of a JSON object, duplicates resolved (the last wins), values as raw bytes.

    Raises `HelixError` INVALID_JSON for what is not UTF-8, not JSON or not an object.
    """
    try:
        if not body.isascii():
            body.decode("utf-8")
        return _FIELDS.decode(body)
    except UnicodeDecodeError as exc:
        raise HelixError(
            ErrorKind.INVALID_JSON,
            f"The request body is not valid UTF-8 (byte {exc.start}). Send JSON encoded as UTF-8.",
        ) from exc
    except msgspec.ValidationError as exc:
        raise HelixError(ErrorKind.INVALID_JSON, 'The request body must be a JSON object, like {"model": …}.') from exc
    except (msgspec.DecodeError, RecursionError) as exc:
        detail = "it is nested too deeply" if isinstance(exc, RecursionError) else str(exc)
        raise HelixError(ErrorKind.INVALID_JSON, f"The request body is not valid JSON: {detail}.") from exc


def decode_params(
    body: bytes, decoder: msgspec.json.Decoder[Params], elements: Mapping[str, msgspec.json.Decoder[Any]]
) -> Params:
    """The typed view of `body`.

    `elements` maps field names that hold lists to decoders of one element, so that an error can name the index.
    Raises `HelixError` INVALID_VALUE with `param` set, or INVALID_JSON.
    """
    try:
        return decoder.decode(body)
    except msgspec.ValidationError as exc:
        text = str(exc)
        path_match = _PATH.search(text)
        path = path_match[1] if path_match else ""
        reason = text[: path_match.start()] if path_match else text
        param = _with_indexes(body, path, elements)
        if missing := _MISSING.match(reason):
            param = f"{param}.{missing[1]}" if param else missing[1]
            reason = f"Missing required parameter: '{param}'"
        else:
            reason = f"Invalid value for '{param}': {_plain(reason)}" if param else _plain(reason)
        raise HelixError(ErrorKind.INVALID_VALUE, f"{reason}.", param=param or None) from exc
    except (msgspec.DecodeError, RecursionError) as exc:
        raise HelixError(ErrorKind.INVALID_JSON, "The request body is not valid JSON or is nested too deeply.") from exc


def _plain(reason: str) -> str:
    reason = reason.replace("`", "")
    return reason[0].lower() + reason[1:] if reason[:1].isupper() else reason


def _with_indexes(data: bytes, path: str, elements: Mapping[str, msgspec.json.Decoder[Any]]) -> str:
    """Replaces the `[...]` that msgspec leaves for list positions by the index of the first offending element."""
    head, marker, rest = path.partition("[...]")
    if not marker:
        return path
    raw: bytes | msgspec.Raw = data
    for name in head.split("."):
        if name:
            raw = _FIELDS.decode(raw)[name]
    decoder = elements.get(head.rsplit(".", 1)[-1])
    if decoder is None:  # an object of numbers or strings: its name says enough
        return head
    for index, element in enumerate(_LIST.decode(raw)):
        try:
            decoder.decode(element)
        except msgspec.ValidationError:
            return f"{head}[{index}]" + (_with_indexes(bytes(element), "$" + rest, elements).removeprefix("$"))
    return f"{head}[]{rest}"
