"""What the launcher takes from the settings."""

import tempfile

import pytest

from helixflow.launch.launcher import LauncherOptions
from helixflow.settings.tree import MeteringSettings, Settings


@pytest.mark.parametrize(("enabled", "module"), [(True, "helixflow.launch.shipper"), (False, None)])
def test_there_is_a_shipper_where_something_is_metered(enabled: bool, module: str | None) -> None:
    settings = Settings(metering=MeteringSettings(enabled=enabled))
    with tempfile.TemporaryFile() as file:
        file.write(settings.model_dump_json().encode())
        file.flush()
        options = LauncherOptions.read(file.fileno(), listen_fd=0)
    assert options.shipper_module == module
