"""How a configuration comes into force: read, held against the rules, compared, added to the history."""

import asyncio
from collections.abc import Sequence
from contextlib import AbstractAsyncContextManager
from dataclasses import dataclass
from typing import Any, Final

from helixflow.auth.audit.entry import INSTALLATION
from helixflow.auth.configuration.differences import Difference, find_differences
from helixflow.auth.configuration.feed import Serving, ServingFeed
from helixflow.auth.configuration.history import History, Origin, Version
from helixflow.auth.configuration.rules import Rules
from helixflow.auth.unit import Unit
from helixflow.auth.versions import check_version
from helixflow.core.errors import ErrorKind, HelixError, UserError
from helixflow.settings.configuration import Models, Refused, document_of, parse_document, read_document, read_models
from helixflow.settings.masking import restore_secrets
from helixflow.settings.problems import Problem

_TARGET: Final = "configuration"


@dataclass(frozen=True, slots=True)
class Proposal:
    """A configuration that may come into force. `base` is what its `differences` are from; `complete` are its models
    with what the catalogue says.
    """

    document: str
    complete: Models
    base: Serving
    differences: Sequence[Difference]


class Changing:
    """Proposes configurations and puts them in force."""

    def __init__(self, feed: ServingFeed, history: History, rules: Rules) -> None:
        self._feed = feed
        self._history = history
        self._rules = rules

    async def propose(self, document: str) -> Proposal:
        """Raises `Refused` with all that is wrong with it; `HelixError`s of `storage`."""
        await self._feed.look()
        base = self._feed.current
        return await asyncio.to_thread(self._propose, document, base)

    async def put_in_force(
        self,
        writing: AbstractAsyncContextManager[Unit],
        proposal: Proposal,
        origin: Origin,
        note: str = "",
        *,
        if_version: int = 0,
    ) -> Version:
        """The version that it becomes; what changes nothing stays the version that is in force.

        Raises `HelixError`: PRECONDITION_FAILED when `if_version` is not in force, CONFLICT when somebody else was
        quicker.
        """
        async with writing as unit:
            newest = await self._history.newest(unit.connection)
            if newest is None or newest.revision != proposal.base.revision:
                check_version(newest.revision if newest is not None else 0, if_version)
                raise HelixError(ErrorKind.CONFLICT, "The configuration has been changed meanwhile: try again.")
            check_version(newest.revision, if_version)
            if not proposal.differences:
                return newest
            version = await self.add(unit, proposal.document, newest.revision + 1, origin, note)
            unit.record(
                _TARGET,
                str(version.revision),
                before={"revision": newest.revision},
                after={
                    "revision": version.revision,
                    "origin": origin,
                    "note": note,
                    "changes": [_visible(difference) for difference in proposal.differences],
                },
                organisation_id=INSTALLATION,
            )
        await self._feed.look()
        return version

    async def add(self, unit: Unit, document: str, revision: int, origin: Origin, note: str = "") -> Version:
        """The next version, unconditionally; the caller records it."""
        caller = unit.caller
        version = Version(revision, unit.now, caller.subject_id, caller.name, origin, note, document)
        await self._history.add(unit.connection, version)
        return version

    def _propose(self, document: str, base: Serving) -> Proposal:
        """In a thread: it looks at files."""
        tree = restore_secrets(parse_document(document), parse_document(base.document))
        models = read_models(tree)
        in_force = {model.name: model for model in read_document(base.document)}
        problems = [
            problem
            for problem in self._rules.find_problems(models)
            # What is served as it is must not keep others from being changed.
            if not _is_unchanged(problem, models, in_force)
        ]
        if problems:
            raise Refused(problems)
        try:
            complete = self._rules.complete(models)
        except UserError as exc:
            raise Refused([Problem(("models",), exc.message)]) from exc
        return Proposal(document_of(models), complete, base, find_differences(base.models, complete))


def refusal(refused: Refused) -> HelixError:
    """UNPROCESSABLE, about the first of its problems; the others are in its message."""
    first, *others = refused.problems
    message = first.reason
    if others:
        message += "".join(f"; {problem}" for problem in others[:_MAX_SAID])
        message += f"; and {len(others) - _MAX_SAID} more" if len(others) > _MAX_SAID else ""
    return HelixError(ErrorKind.UNPROCESSABLE, message, param=first.path or "models")


_MAX_SAID: Final = 9


def _is_unchanged(problem: Problem, models: Models, in_force: dict[str, Any]) -> bool:
    match problem.location:
        case ("models", int(index), *_) if index < len(models):
            model = models[index]
            return in_force.get(model.name) == model
    return False


def _visible(difference: Difference) -> dict[str, Any]:
    return {
        "model": difference.model,
        "deployment": difference.deployment,
        "kind": difference.kind,
        "fields": {field.name: [field.before, field.after] for field in difference.fields},
    }
