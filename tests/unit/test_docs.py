"""The documentation keeps up with the code: what exists is named, links lead somewhere, nothing here is private."""

import ast
import re
import tomllib
from pathlib import Path
from typing import Any, get_args, get_origin

import pytest
from typer.main import get_command

from helixflow.cli.main import app
from helixflow.core.errors import ERRORS, ErrorKind
from helixflow.settings.deployments import Launched, Provider
from helixflow.settings.models import ModelSettings
from helixflow.settings.section import Section
from helixflow.settings.tree import Settings

ROOT = Path(__file__).resolve().parents[2]
PACKAGE = ROOT / "src" / "helixflow"
DOCS = ROOT / "docs"
PAGES = sorted([*DOCS.rglob("*.md"), ROOT / "README.md", ROOT / "CHANGELOG.md"])
ROOMS = sorted(folder.name for folder in PACKAGE.iterdir() if (folder / "__init__.py").is_file())
DECISIONS = sorted((DOCS / "decisions").glob("*.md"))

_LINK = re.compile(r"\[[^\]]*\]\(([^)\s]+)\)")
_CODE = re.compile(r"^```.*?^```", re.MULTILINE | re.DOTALL)
# A pattern in backticks may look like a link.
_INLINE = re.compile(r"`[^`\n]*`")
_HEADING = re.compile(r"^#+ (.+)$", re.MULTILINE)
_PRIVATE = re.compile(
    r"(?<![\w.])/(?:work|root|tmp|mnt|home/\w+)/|pypi\.org|python[h]osted|index-url|deb\.debian|registry\.npmjs|proxy\.golang"
)


def _name(page: Path) -> str:
    return str(page.relative_to(ROOT))


def _sections(section: type[Section], path: str) -> list[tuple[str, str]]:
    """(heading on the page, key) of every setting below `section`."""
    found = []
    for name, field in section.model_fields.items():
        annotation = field.annotation
        if isinstance(annotation, type) and issubclass(annotation, Section):
            dotted = f"{path}.{name}" if path else name
            found += _sections(annotation, dotted)
        else:
            found.append((f"## `[{path}]`" if path else "## Top level", name))
    return found


def _deployment_keys() -> list[tuple[str, str]]:
    found = [("## `[[models]]`", name) for name in ModelSettings.model_fields]
    for deployment in (*get_args(Launched), *get_args(Provider)):
        engine = get_args(deployment.model_fields["engine"].annotation)[0]
        heading = f'## `[[models.deployments]]` with `engine = "{engine}"`'
        found += [(heading, name) for name in deployment.model_fields]
    return found


def _commands(command: Any, name: str) -> list[str]:
    children = getattr(command, "commands", {})
    names = [name]
    for child_name, child in children.items():
        if not child.hidden:
            names += _commands(child, f"{name} {child_name}")
    return names


def test_every_setting_is_on_its_section_of_the_page() -> None:
    page = (DOCS / "reference" / "settings.md").read_text(encoding="utf-8")
    by_heading = {part.partition("\n")[0]: part for part in re.split(r"^(?=## )", page, flags=re.MULTILINE)}
    keys = _sections(Settings, "") + _deployment_keys()
    assert len(keys) > 50
    missing = [(heading, key) for heading, key in keys if f"| `{key}` |" not in by_heading.get(heading, "")]
    assert missing == []


def test_every_kind_of_deployment_has_a_section() -> None:
    deployments = ModelSettings.model_fields["deployments"].annotation
    assert get_origin(deployments) is tuple
    union = get_args(get_args(deployments)[0])[0]
    assert set(get_args(union)) == {*get_args(Launched), *get_args(Provider)}


def test_every_command_is_on_the_page() -> None:
    page = (DOCS / "reference" / "cli.md").read_text(encoding="utf-8")
    commands = _commands(get_command(app), "helixflow")
    assert "helixflow keys create" in commands
    assert [name for name in commands if f"# `{name}`\n" not in page] == []


@pytest.mark.parametrize("kind", ErrorKind)
def test_every_error_is_on_the_page(kind: ErrorKind) -> None:
    page = (DOCS / "reference" / "errors.md").read_text(encoding="utf-8")
    assert f"| `{kind.value}` | {ERRORS[kind].http} |" in page


@pytest.mark.parametrize("room", ROOMS)
def test_every_room_says_what_it_is_and_stands_in_the_architecture(room: str) -> None:
    docstring = ast.get_docstring(ast.parse((PACKAGE / room / "__init__.py").read_text(encoding="utf-8")))
    assert docstring, f"{room}/__init__.py has no docstring"
    page = (DOCS / "explanation" / "architecture.md").read_text(encoding="utf-8")
    assert f"| `{room}` |" in page


def test_the_architecture_names_no_room_that_is_gone() -> None:
    page = (DOCS / "explanation" / "architecture.md").read_text(encoding="utf-8")
    table = page.partition("| room | holds |")[2].partition("\n\n")[0]
    assert sorted(re.findall(r"^\| `(\w+)` \|", table, re.MULTILINE)) == ROOMS


def test_every_dependency_has_its_line_in_the_decision() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    names = [re.split(r"[\[><=!~ ;]", requirement)[0] for requirement in project["dependencies"]]
    page = (DOCS / "decisions" / "0004-dependencies.md").read_text(encoding="utf-8")
    assert [name for name in names if f"| {name} |" not in page] == []


@pytest.mark.parametrize("decision", DECISIONS, ids=lambda page: page.stem)
def test_every_decision_has_its_parts_and_is_numbered(decision: Path) -> None:
    text = decision.read_text(encoding="utf-8")
    number = re.match(r"(\d{4})-", decision.name)
    assert number is not None
    assert text.startswith(f"# {int(number[1])}. ")
    headings = _HEADING.findall(text)[1:]
    assert [name for name in ("Context", "Decision", "Consequences", "Check") if name not in headings] == []


@pytest.mark.parametrize("page", PAGES, ids=_name)
def test_links_lead_somewhere(page: Path) -> None:
    text = _INLINE.sub("", _CODE.sub("", page.read_text(encoding="utf-8")))
    broken = [
        link for link in _LINK.findall(text) if "://" not in link and not _leads_somewhere(page, *link.split("#", 1))
    ]
    assert broken == []


def _leads_somewhere(page: Path, path: str, anchor: str = "") -> bool:
    target = (page.parent / path).resolve() if path else page
    if not target.is_relative_to(ROOT) or not target.exists():
        return False
    return not anchor or anchor in _anchors(target.read_text(encoding="utf-8"))


def _anchors(text: str) -> set[str]:
    """As GitHub makes them."""
    headings = _HEADING.findall(_CODE.sub("", text))
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", PAGES, ids=_name)
def test_code_that_is_named_exists(page: Path) -> None:
    """Paths in backticks, as the pages name them: from the repository's root or from the package."""
    text = _CODE.sub("", page.read_text(encoding="utf-8"))
    named = re.findall(r"`((?:[\w-]+/)+[\w-]+\.(?:py|md|toml|proto))`", text)
    assert [path for path in named if not ((ROOT / path).exists() or (PACKAGE / path).exists())] == []


@pytest.mark.parametrize("page", PAGES, ids=_name)
def test_nothing_of_this_machine_is_in_the_pages(page: Path) -> None:
    found = [line for line in page.read_text(encoding="utf-8").splitlines() if _PRIVATE.search(line)]
    assert found == []
