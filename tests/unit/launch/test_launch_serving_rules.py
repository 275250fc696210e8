"""What a configuration is refused for before a start would stumble over it: files of models."""

from pathlib import Path

import pytest

from helixflow.core.errors import ExitCode, UserError
from helixflow.launch.serve import pull_for_start
from helixflow.launch.serving_rules import find_model_problems
from helixflow.pool.catalogue import Catalogue
from helixflow.pool.plan import plan_deployments
from helixflow.settings.deployments import LlamaCppDeployment
from helixflow.settings.models import ModelSettings
from helixflow.settings.problems import Problem
from helixflow.settings.serving import PoolSettings
from helixflow.settings.tree import Settings

CATALOGUE = Catalogue.load()


def models(path: Path, **settings: object) -> tuple[ModelSettings, ...]:
    fields = {"engine": "llama_cpp", "source": f"file:{path}", **settings}
    good = ModelSettings(name="all-minilm-l6-v2")
    return good, ModelSettings(name="m", deployments=(LlamaCppDeployment.model_validate(fields),))


def problems(settings: Settings, path: Path, *, here: bool = True, **more: object) -> list[Problem]:
    return list(find_model_problems(settings, models(path, **more), CATALOGUE, on_this_machine=here))


@pytest.mark.parametrize(
    ("content", "reason"),
    [(None, "No such file"), (b"", "not a usable model"), (b"no GGUF at all", "not a usable model")],
)
@pytest.mark.parametrize("load", ["start", "first_use"])
def test_a_model_file_must_be_there_and_be_one(tmp_path: Path, content: bytes | None, reason: str, load: str) -> None:
    path = tmp_path / "m.gguf"
    if content is not None:
        path.write_bytes(content)
    (problem,) = problems(Settings(data_dir=tmp_path), path, load=load)
    assert problem.location == ("models", 1, "deployments", 0, "source")
    assert reason in problem.reason and str(path) in problem.reason


def test_files_of_other_nodes_are_theirs(tmp_path: Path) -> None:
    path = tmp_path / "nowhere.gguf"
    settings = Settings(data_dir=tmp_path, pool=PoolSettings(name="near"))
    assert problems(settings, path, here=False) == []
    assert problems(settings, path, nodes=["far"]) == []
    assert len(problems(settings, path, nodes=["far", "near"])) == 1


def test_a_start_stops_at_a_file_that_the_configuration_names_and_not_at_one_that_was_applied(tmp_path: Path) -> None:
    path = tmp_path / "gone.gguf"
    settings = Settings(data_dir=tmp_path, models=models(path)[1:])
    planned = plan_deployments(settings, CATALOGUE)
    with pytest.raises(UserError, match="No such file") as caught:
        pull_for_start(settings, planned)
    assert caught.value.exit_code is ExitCode.MODEL
    pull_for_start(settings, planned, applied=True)
