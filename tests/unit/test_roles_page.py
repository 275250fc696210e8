from helixflow.core.permissions import ROLES, Permission
from helixflow.rpc.access import declared_access
from helixflow.rpc.generated.auth_v1 import admin_pb2, identity_pb2, sessions_pb2
from tools.roles_page import render_roles


def rows(first_cell: str) -> list[list[str]]:
    """The cells of the table rows that begin with that one."""
    found = [line for line in render_roles().splitlines() if line.startswith(f"| {first_cell} |")]
    return [[cell.strip() for cell in line.split("|")[1:-1]] for line in found]


def test_the_table_of_roles_says_who_holds_what() -> None:
    for permission in Permission:
        held = [row for row in rows(f"`{permission.value}`") if len(row) == 1 + len(ROLES)]
        # Those of the installation are in no role.
        expected = ["✓" if permission in ROLES[role] else "" for role in ROLES]
        assert [row[1:] for row in held] == ([expected] if "✓" in expected else [])


def test_every_rpc_is_shown_with_its_permission() -> None:
    for file in (admin_pb2, sessions_pb2, identity_pb2):
        for service in file.DESCRIPTOR.services_by_name.values():
            for method, access in declared_access(service):
                if access.permission is not None:
                    (row,) = (row for row in rows(f"`{access.permission.value}`") if len(row) == 3)
                    assert f"`{method.name}`" in row[2]
                else:
                    assert f"`{method.name}`" in render_roles().split("## Calls that need no permission")[1]
