"""Chains of keys: what is on a key holds for all that it was rotated to, so that nobody escapes it by rotating.

Keys are never deleted, and each has one predecessor at most: a chain ends.
"""

from typing import Any

from sqlalchemy import CTE, ColumnElement, Select, Text, cast, select

from helixflow.storage.schema import api_keys


def with_predecessors(key_id: ColumnElement[str], *, name: str = "chain") -> CTE:
    """Column `id`: that key, known or not, and all that it was rotated from."""
    chain = select(cast(key_id, Text).label("id")).cte(name, recursive=True)
    older = select(api_keys.c.rotated_from).join(chain, api_keys.c.id == chain.c.id)
    return chain.union_all(older.where(api_keys.c.rotated_from.is_not(None)))


def with_successors(key_ids: "Select[Any]", *, name: str = "chain") -> CTE:
    """Columns `first` and `id`: each of those keys, with itself and all that it was rotated to."""
    found = key_ids.subquery()
    (key_id,) = found.c
    chain = select(key_id.label("first"), key_id.label("id")).cte(name, recursive=True)
    return chain.union_all(
        select(chain.c.first, api_keys.c.id).join(chain, api_keys.c.rotated_from == chain.c.id),
    )
