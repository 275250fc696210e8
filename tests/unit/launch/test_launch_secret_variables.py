"""Engines are foreign programs: no secret of ours is in their environment."""

import json

from helixflow.launch.launcher import find_secret_variables
from helixflow.settings.deployments import OpenAIDeployment
from helixflow.settings.masking import secret_variables
from helixflow.settings.models import ModelSettings
from helixflow.settings.tree import AuthSettings, DatabaseSettings, RedisSettings, Settings


def test_every_variable_that_the_settings_name_is_kept_from_engines() -> None:
    deployment = OpenAIDeployment(
        engine="openai", base_url="https://models.example.com/v1", api_key_env="THEIR_KEY", headers={"x": "a ${TEAM}"}
    )
    settings = Settings(
        auth=AuthSettings(master_key_env="MASTER"),
        database=DatabaseSettings(password_env="DB_PASSWORD"),
        redis=RedisSettings(password_env="REDIS_PASSWORD"),
        models=(ModelSettings(name="m", deployments=(deployment,)),),
    )
    assert secret_variables(settings.models) == {"THEIR_KEY", "TEAM"}
    names = find_secret_variables(json.loads(settings.model_dump_json()))
    assert names == {"MASTER", "DB_PASSWORD", "REDIS_PASSWORD", "THEIR_KEY", "TEAM"}


def test_settings_that_name_none_are_understood() -> None:
    assert find_secret_variables(json.loads(Settings().model_dump_json())) == set()
