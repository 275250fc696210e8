"""What limits and budgets have in common: who sees and changes them, one of each kind, and that gateways are told.

An organisation's own ones are its administrators' matter. Imposed ones, and those of the installation, are the
operators'; the organisation sees the former and cannot change them.
"""

import secrets
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

from sqlalchemy import Row, Table, and_, delete, func, insert, literal, select

from helixflow.auth.audit.entry import INSTALLATION
from helixflow.auth.key_chains import with_predecessors
from helixflow.auth.paging import read_page
from helixflow.auth.policy_subjects import Subject, check_may_impose, check_organisation, parse_scope
from helixflow.auth.unit import Unit
from helixflow.auth.versions import check_version, revise
from helixflow.core.errors import ErrorKind, HelixError
from helixflow.metering.policies import Scope
from helixflow.rpc.generated.auth_v1 import usage_pb2
from helixflow.rpc.generated.auth_v1.identity_pb2 import CHANGE_KIND_POLICIES

# Of each sort in one organisation.
MAX_POLICIES: Final = 1000


@dataclass(frozen=True, slots=True)
class PolicyTable:
    """`noun` is its name in the audit log, errors and ids; `kind` are the columns that, beside the subject, make two
    policies the same; `describe` is what the audit log says of a row, beside its subject.
    """

    table: Table
    noun: str
    kind: tuple[str, ...]
    describe: Callable[[Row[Any]], Mapping[str, Any]]

    async def add(self, unit: Unit, subject: Subject, imposed: bool, values: Mapping[str, Any]) -> Row[Any]:
        """A new one. Raises `HelixError` CONFLICT when there is one of its kind, or too many altogether."""
        columns = {
            "organisation_id": subject.organisation_id,
            "scope": subject.scope.value,
            "subject_id": subject.id,
            "imposed": imposed,
            **values,
        }
        await self._check_room(unit, columns)
        statement = insert(self.table).values(
            id=self._new_id(), **columns, created_at=unit.now, updated_at=unit.now, version=1
        )
        row = (await unit.connection.execute(statement.returning(*self.table.c))).one()
        self._record(unit, row, before=None, after=row)
        await _tell(unit, row)
        return row

    async def find(self, unit: Unit, policy_id: str) -> Row[Any]:
        """One that the caller may see. Raises `HelixError` NOT_FOUND, also for those of other organisations."""
        row = (await unit.connection.execute(select(self.table).where(self.table.c.id == policy_id))).first()
        if row is None or not (row.organisation_id == unit.caller.organisation_id or unit.caller.operator):
            raise HelixError(ErrorKind.NOT_FOUND, f"There is no {self.noun} {policy_id!r}.", param="id")
        return row

    async def find_changeable(self, unit: Unit, policy_id: str, if_version: int) -> Row[Any]:
        """Raises `HelixError` as `find`, PERMISSION_DENIED for what others decide about, PRECONDITION_FAILED."""
        row = await self.find(unit, policy_id)
        if row.imposed:
            check_may_impose(unit)
        elif row.organisation_id != unit.caller.organisation_id:
            message = f"Not permitted: this {self.noun} is the organisation's own. Impose another one."
            raise HelixError(ErrorKind.PERMISSION_DENIED, message)
        check_version(row.version, if_version)
        return row

    async def read_page(self, unit: Unit, request: usage_pb2.ListPoliciesRequest) -> tuple[Sequence[Row[Any]], str]:
        """Newest first, with the cursor of the next page. Operators see those of the installation as well.

        A key's are all that hold for it: also those of the keys that it was rotated from.

        Raises `HelixError`: PERMISSION_DENIED for another organisation, UNPROCESSABLE.
        """
        table, own = self.table.c, unit.caller.organisation_id
        organisation_id = request.organisation_id or own
        if organisation_id != own:
            check_may_impose(unit)
            await check_organisation(unit, organisation_id)
        visible = (organisation_id, "") if unit.caller.operator else (organisation_id,)
        query = select(self.table).where(table.organisation_id.in_(visible))
        if request.scope:
            query = query.where(table.scope == parse_scope(request.scope).value)
        if request.subject_id:
            chain = with_predecessors(literal(request.subject_id))
            query = query.where(table.subject_id.in_(select(chain.c.id)))
        order = (table.created_at, table.id)
        return await read_page(unit.connection, query, order, page_size=request.page_size, cursor=request.cursor)

    async def change(self, unit: Unit, row: Row[Any], values: Mapping[str, Any]) -> Row[Any]:
        """`row` with those values; nothing is told when it has them already."""
        after = await revise(unit, self.table, row, values)
        if after is not row:
            self._record(unit, row, before=row, after=after)
            await _tell(unit, row)
        return after

    async def remove(self, unit: Unit, row: Row[Any]) -> None:
        await unit.connection.execute(delete(self.table).where(self.table.c.id == row.id))
        self._record(unit, row, before=row, after=None)
        await _tell(unit, row)

    async def _check_room(self, unit: Unit, columns: Mapping[str, Any]) -> None:
        table = self.table.c
        same = and_(
            *(table[name] == columns[name] for name in ("organisation_id", "scope", "subject_id", "imposed")),
            *(table[name] == columns[name] for name in self.kind),
        )
        twin = (await unit.connection.execute(select(table.id).where(same))).first()
        if twin is not None:
            message = f"There is a {self.noun} of that kind already: change {twin.id}."
            raise HelixError(ErrorKind.CONFLICT, message)
        mine = table.organisation_id == columns["organisation_id"]
        if (await unit.connection.execute(select(func.count()).where(mine))).scalar_one() >= MAX_POLICIES:
            raise HelixError(
                ErrorKind.CONFLICT, f"There are {MAX_POLICIES} {self.noun}s already: delete some that are of no use."
            )

    def _new_id(self) -> str:
        return f"{self.noun}_{secrets.token_hex(12)}"

    def _record(self, unit: Unit, row: Row[Any], *, before: Row[Any] | None, after: Row[Any] | None) -> None:
        """In the log of the organisation; of the installation too, where operators decided."""
        chains = (INSTALLATION, row.organisation_id) if row.imposed else (row.organisation_id,)
        for chain in dict.fromkeys(chains):
            was, became = self._described(before), self._described(after)
            unit.record(self.noun, row.id, before=was, after=became, organisation_id=chain)

    def _described(self, row: Row[Any] | None) -> dict[str, Any] | None:
        if row is None:
            return None
        subject = {"organisation_id": row.organisation_id, "subject_id": row.subject_id, "imposed": row.imposed}
        return {"scope": Scope(row.scope).name.lower(), **subject, **self.describe(row)}


async def _tell(unit: Unit, row: Row[Any]) -> None:
    """Gateways forget what applies to anybody in the organisation; '' is all of them."""
    await unit.change(CHANGE_KIND_POLICIES, row.organisation_id, organisation_id=row.organisation_id)
