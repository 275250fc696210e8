import stat
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from helixflow.core.errors import ExitCode, UserError
from helixflow.metering.node import read_node_id
from helixflow.settings.tree import Settings


def test_a_node_has_one_id_whoever_asks_first(tmp_path: Path) -> None:
    settings = Settings(data_dir=tmp_path / "data")
    with ThreadPoolExecutor(8) as threads:
        (node_id,) = set(threads.map(lambda _: read_node_id(settings), range(32)))
    assert len(node_id) == 16
    assert int(node_id, 16) >= 0
    (path,) = settings.data_dir.iterdir()
    assert stat.S_IMODE(path.stat().st_mode) == 0o600


def test_a_file_that_holds_something_else_is_not_taken_for_an_id(tmp_path: Path) -> None:
    (tmp_path / "node.id").write_text("node one\n")
    with pytest.raises(UserError, match=r"node\.id: is not the id of a node; remove it") as caught:
        read_node_id(Settings(data_dir=tmp_path))
    assert caught.value.exit_code is ExitCode.STORAGE
