from pathlib import Path
from typing import get_args

import pytest

from helixflow.settings.deployments import Launched, Provider
from helixflow.settings.models import ModelSettings
from helixflow.settings.serving import PoolSettings, RoutingSettings
from helixflow.settings.tree import (
    AuthSettings,
    CorsSettings,
    DatabaseSettings,
    GatewaySettings,
    LogSettings,
    MeteringSettings,
    PkiSettings,
    RedisSettings,
    Settings,
)
from tools.generate import OWNED_FOLDERS, stale_files
from tools.settings_page import render_settings

SECTIONS = [
    Settings,
    GatewaySettings,
    CorsSettings,
    AuthSettings,
    PkiSettings,
    RedisSettings,
    DatabaseSettings,
    LogSettings,
    MeteringSettings,
    ModelSettings,
    *get_args(Launched),
    *get_args(Provider),
    RoutingSettings,
    PoolSettings,
]


@pytest.mark.parametrize("section", SECTIONS)
def test_every_setting_is_documented(section: type[Settings]) -> None:
    page = render_settings()
    for name, field in section.model_fields.items():
        if isinstance(field.annotation, type) and field.annotation in SECTIONS:
            continue
        assert field.description, f"{section.__name__}.{name} has no description"
        assert any(line.startswith(f"| `{name}` |") and field.description in line for line in page.splitlines())


def test_bounds_defaults_and_environment_names_are_shown() -> None:
    page = render_settings()
    assert "| `http_port` | integer | `8080` | ≥ 0, ≤ 65535 |" in page
    assert "`HELIXFLOW_GATEWAY__CORS__MAX_AGE_S`" in page
    assert "`HELIXFLOW_GATEWAY__CORS__ORIGINS`" in page
    assert "`HELIXFLOW_MODELS`" in page
    assert "HELIXFLOW_MODELS__" not in page, "what is inside an array has no variable"


def test_changed_missing_and_leftover_files_are_stale(tmp_path: Path) -> None:
    fresh, root = tmp_path / "fresh", tmp_path / "root"
    owned = OWNED_FOLDERS[0]
    for folder in (fresh, root):
        (folder / owned).mkdir(parents=True)
        (folder / owned / "same.py").write_text("1")
    (fresh / owned / "changed.py").write_text("1")
    (root / owned / "changed.py").write_text("2")
    (fresh / owned / "missing.py").write_text("1")
    (root / owned / "leftover.py").write_text("1")
    (root / "hand-written.md").write_text("1")
    assert [path.name for path in stale_files(fresh, root)] == ["changed.py", "leftover.py", "missing.py"]
