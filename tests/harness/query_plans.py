"""How a database goes about what it is asked: the statements that some code makes, each with its plan."""

from collections.abc import Awaitable, Callable
from typing import Any

from sqlalchemy import event

from helixflow.storage.engine import Database


async def explain(database: Database, do: Callable[[], Awaitable[object]]) -> list[tuple[str, str]]:
    """The SELECTs that `do` makes in transactions, with their plans; for PostgreSQL no table is short."""
    asked: list[tuple[str, Any]] = []
    engine = database._engine.sync_engine

    def note(_connection: Any, _cursor: Any, statement: str, parameters: Any, *_: Any) -> None:
        if statement.startswith("SELECT"):
            asked.append((statement, parameters))

    event.listen(engine, "before_cursor_execute", note)
    try:
        await do()
    finally:
        event.remove(engine, "before_cursor_execute", note)
    plans = []
    async with database.reading() as connection:
        words = "EXPLAIN QUERY PLAN"
        if engine.dialect.name == "postgresql":
            await connection.exec_driver_sql("SET LOCAL enable_seqscan = off")
            words = "EXPLAIN"
        for statement, parameters in asked:
            plan = (await connection.exec_driver_sql(f"{words} {statement}", parameters)).all()
            plans.append((statement, "\n".join(str(row[-1]) for row in plan)))
    return plans
