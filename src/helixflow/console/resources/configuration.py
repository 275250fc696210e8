"""The serving configuration: which models are served by what, what would change, and how it came to be so."""

import json
from typing import Annotated, Any, Literal

from fastapi import Path
from pydantic import BeforeValidator, Field

from helixflow.console.endpoint import CONFIGURATION, endpoint
from helixflow.console.fields import Moment, OptionalText, Shape
from helixflow.console.models import Given, Page, Shown
from helixflow.rpc.generated.auth_v1 import configuration_pb2 as pb

# Key files and the catalogue are looked at.
_TIMEOUT_S = 30.0
_MAX_REVISION = 2**53
_MODELS = [
    [
        {
            "name": "gpt-4o",
            "deployments": [
                {"engine": "openai", "base_url": "https://api.openai.com/v1", "api_key_env": "OPENAI_API_KEY"}
            ],
        }
    ]
]
_NOTE = ["more weight for the second region"]
Models = Annotated[
    list[dict[str, Any]],
    Field(max_length=10_000, examples=_MODELS, description="As `models` in the configuration file."),
]
Note = Annotated[
    str,
    Field(max_length=500, examples=_NOTE),
    Shape(r"^[^\x00]*$", "must not hold NUL characters"),
]
Revision = Annotated[int, Field(ge=1, le=_MAX_REVISION, examples=[3])]
ShownModels = Annotated[
    list[dict[str, Any]],
    BeforeValidator(lambda document: json.loads(document)["models"] if isinstance(document, str) else document),
]


class ConfigurationSummary(Shown):
    """One version of the serving configuration."""

    version: int = Field(description="Its number; versions are never changed. The `ETag`.", examples=[3])
    created_at: Moment = Field(description="When it came into force.")
    actor_id: OptionalText = Field(
        description="Who put it in force; null for an edited file.", examples=["user_5d41402abc4b2a76b9719d91"]
    )
    actor_name: OptionalText = Field(description="Their name.", examples=["Ada"])
    origin: Literal["file", "apply", "api", "rollback"] = Field(
        description="What it came from: the configuration file, `helixflow apply`, this API, an earlier version.",
        examples=["apply"],
    )
    note: OptionalText = Field(description="What was said of it.", examples=_NOTE)


class Configuration(ConfigurationSummary):
    """The serving configuration."""

    models: ShownModels = Field(
        validation_alias="document",
        description="As `models` in the configuration file, without defaults. Values of headers that may be secrets "
        "are `…hidden…`.",
        examples=_MODELS,
    )


class ConfigurationPage(Page[ConfigurationSummary]):
    """One page of versions."""


class NewConfiguration(Given):
    """A configuration to be put in force."""

    models: Models = Field(
        description="All models, as in the configuration file. What is `…hidden…` stays as it is in the deployment of "
        "the same name."
    )
    note: Note | None = Field(None, description="What the change is for.", examples=_NOTE)
    origin: Literal["api", "apply"] = Field("api", description="`apply` for the command line.")


class ConfigurationQuestion(Given):
    """A configuration to be compared: models, or an earlier version."""

    models: Models | None = Field(
        None, description="All models, as in the configuration file; null: those of `revision`.", examples=_MODELS
    )
    revision: Revision | None = Field(None, description="The earlier version, where no models are given.", examples=[3])


class NewRollback(Given):
    """An earlier version to be put in force again."""

    revision: Revision = Field(description="Its number.")
    note: Note | None = Field(None, description="What it is for.", examples=_NOTE)


class FieldChange(Shown):
    """A setting that changes."""

    name: str = Field(description="Which one.", examples=["weight"])
    before: OptionalText = Field(description="As JSON; null: it was not there.", examples=["1.0"])
    after: OptionalText = Field(description="As JSON; null: it is not there any more.", examples=["3.0"])


class ConfigurationChange(Shown):
    """A model or a deployment that comes, goes or changes."""

    model: str = Field(description="The model.", examples=["gpt-4o"])
    deployment: OptionalText = Field(
        description="The deployment, named as in records; null: the model itself.", examples=["gpt-4o/openai-0"]
    )
    kind: Literal["added", "removed", "changed"] = Field(description="What happens to it.", examples=["changed"])
    fields: Annotated[list[FieldChange], BeforeValidator(list)] = Field(description="Its settings that change.")
    requests: int = Field(description="Requests of the last 24 hours that were recorded for it.", examples=[1200])
    unserved: bool = Field(
        description="Such requests would be refused: nothing of this name is left.", examples=[False]
    )


class ConfigurationPlan(Shown):
    """What would change."""

    version: int = Field(description="The version in force, which it is compared with.", examples=[3])
    changes: Annotated[list[ConfigurationChange], BeforeValidator(list)] = Field(description="Empty: nothing.")


class Follower(Shown):
    """A gateway or a pool."""

    instance: str = Field(description="Of one process, as long as it lives.", examples=["9f86d081884c7d65"])
    service: str = Field(description="`gateway` or `pool`.", examples=["gateway"])
    node: str = Field(description="Where it runs.", examples=["node-1"])
    version: int = Field(description="The version that it serves; 0: it has not said yet.", examples=[3])
    problem: OptionalText = Field(
        description="Why it serves no later one; null: nothing is wrong.",
        examples=["the deployment gpt-4o/openai-0: the secret file /run/key is empty"],
    )


class Followers(Shown):
    """All that follow the configuration."""

    data: Annotated[list[Follower], BeforeValidator(list)] = Field(
        validation_alias="followers", description="By service and node."
    )


@endpoint("GET", "/configuration", CONFIGURATION["GetConfiguration"], Configuration)
def get_configuration() -> pb.GetConfigurationRequest:
    """The configuration in force."""
    return pb.GetConfigurationRequest()


@endpoint(
    "PUT", "/configuration", CONFIGURATION["ApplyConfiguration"], Configuration, timeout_s=_TIMEOUT_S, errors=(409,)
)
def apply_configuration(body: NewConfiguration) -> pb.ApplyConfigurationRequest:
    """Puts a configuration in force, everywhere within a second; running requests are left alone. 422 names the path of
    what is wrong, such as `models[1].deployments[0].weight`, and nothing changes. What is as it was makes no version.
    """
    return pb.ApplyConfigurationRequest(
        document=_document(body.models), note=body.note or "", origin="" if body.origin == "api" else body.origin
    )


@endpoint(
    "POST",
    "/configuration/plan",
    CONFIGURATION["PlanConfiguration"],
    ConfigurationPlan,
    timeout_s=_TIMEOUT_S,
    errors=(404,),
)
def plan_configuration(body: ConfigurationQuestion) -> pb.PlanConfigurationRequest:
    """What would change, and how many recorded requests went there. Changes nothing; 422 as for putting it in force."""
    document = _document(body.models) if body.models is not None else ""
    return pb.PlanConfigurationRequest(document=document, revision=body.revision or 0)


@endpoint("GET", "/configuration/revisions", CONFIGURATION["ListConfigurations"], ConfigurationPage)
def list_configurations() -> pb.ListConfigurationsRequest:
    """All versions, newest first."""
    return pb.ListConfigurationsRequest()


@endpoint(
    "GET",
    "/configuration/revisions/{revision}",
    CONFIGURATION["GetConfiguration"],
    Configuration,
    name="GetConfigurationRevision",
    errors=(404,),
)
def get_configuration_revision(
    revision: Annotated[int, Path(description="The version.", ge=1, le=_MAX_REVISION, examples=[3])],
) -> pb.GetConfigurationRequest:
    """One version."""
    return pb.GetConfigurationRequest(revision=revision)


@endpoint(
    "POST",
    "/configuration/rollback",
    CONFIGURATION["RestoreConfiguration"],
    Configuration,
    timeout_s=_TIMEOUT_S,
    errors=(404, 409),
)
def restore_configuration(body: NewRollback) -> pb.RestoreConfigurationRequest:
    """Puts an earlier version in force again, as a new one."""
    return pb.RestoreConfigurationRequest(revision=body.revision, note=body.note or "")


@endpoint("GET", "/configuration/followers", CONFIGURATION["ListFollowers"], Followers)
def list_followers() -> pb.ListFollowersRequest:
    """Gateways and pools, and which version each of them serves."""
    return pb.ListFollowersRequest()


def _document(models: list[dict[str, Any]]) -> str:
    return json.dumps({"models": models}, ensure_ascii=False)


ENDPOINTS = (
    get_configuration,
    apply_configuration,
    plan_configuration,
    list_configurations,
    get_configuration_revision,
    restore_configuration,
    list_followers,
)
