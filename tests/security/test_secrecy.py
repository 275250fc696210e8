"""What must be nowhere: all that a full run at the finest log level wrote and shows, searched for keys and prompts."""

import json
from contextlib import suppress
from pathlib import Path

import psutil
import pytest

from helixflow.pool.manifest import StoredModel
from tests.harness.files import read_files
from tests.harness.node import CHAT, CHAT_MODEL, EMBEDDING_MODEL, EMBEDDINGS, Node, command_of, eventually, run_node

PROMPTS = [f"marmalade-{number}-xylophone" for number in (7391, 5526, 8804, 1177, 6035)]


async def say_secrets(node: Node, key: str) -> None:
    """Prompts in requests that succeed, are refused, break off and are malformed."""
    assert (await node.chat(PROMPTS[0], key=key)).status == 200
    body = {"model": EMBEDDING_MODEL, "input": [PROMPTS[1]]}
    assert (await node.ask("POST", EMBEDDINGS, body)).status == 200
    assert (await node.chat(PROMPTS[2], max_tokens=10**6)).status == 400
    assert (await node.chat(PROMPTS[2], stop=[PROMPTS[3]], tools=PROMPTS[3])).status == 400
    assert (await node.chat(PROMPTS[2], response_format={"type": PROMPTS[3]})).status == 400
    assert (await node.ask("POST", CHAT, {"model": CHAT_MODEL, "messages": [{"role": PROMPTS[3]}]})).status == 400
    wire = await node.connect()
    wire.send(node.endless_request(PROMPTS[4]))
    await wire.read_head()
    wire.drop()
    await eventually(lambda: [record for record in node.records("request") if record["status"] == 499])


def process_texts(node: Node) -> dict[str, str]:
    """The arguments and environments of all processes, as any user of this account sees them."""
    texts = {}
    for process in node.tree():
        with suppress(psutil.NoSuchProcess):  # one that ends meanwhile
            texts[f"arguments of {process.pid}"] = " ".join(process.cmdline())
            texts[f"environment of {process.pid}"] = json.dumps(process.environ())
    return texts


async def test_keys_and_prompts_are_in_no_file_and_no_argument(
    chat_model: StoredModel, embedding_model: StoredModel, tmp_path: Path
) -> None:
    settings = {"HELIXFLOW_LOG__LEVEL": "debug"}
    with run_node(tmp_path / "data", chat_model, embedding_model, **settings) as node:
        created = json.loads(node.run("keys", "create", "laptop", "--json").stdout)["key"]
        await say_secrets(node, created)
        engine_keys = [node.engine(model).replica.api_key for model in (CHAT_MODEL, EMBEDDING_MODEL)]
        shown = process_texts(node)
        engines = [str(p.pid) for p in node.tree() if "helixflow.engines.llama_cpp.child" in command_of(p)]
    assert len(engines) == 2
    assert all(len(key) >= 32 for key in engine_keys)
    for where, text in shown.items():
        assert not any(key in text for key in engine_keys), where
        assert created not in text, where
        # The operator's own variable stays where the operator put it, but engines, which are foreign code, lack it.
        if "arguments" in where or where.split()[-1] in engines:
            assert node.key not in text, where
    secrets = [node.key, created, *engine_keys, *PROMPTS]
    files = read_files(tmp_path)
    assert any(path.endswith("data.err") and len(content) > 1000 for path, content in files.items())
    assert any(path.endswith(".db") for path in files), list(files)
    for path, content in files.items():
        assert not [secret for secret in secrets if secret.encode() in content], path


@pytest.mark.parametrize("level", ["debug"])
async def test_a_generated_bootstrap_key_is_in_its_own_private_file_only(
    level: str, chat_model: StoredModel, tmp_path: Path
) -> None:
    with run_node(tmp_path / "data", chat_model, HELIXFLOW_LOG__LEVEL=level, HELIXFLOW_BOOTSTRAP_API_KEY="") as node:
        file = tmp_path / "data" / "bootstrap.key"
        node.key = file.read_text().strip()
        assert (await node.chat(PROMPTS[0])).status == 200
        shown = process_texts(node)
    assert file.stat().st_mode & 0o777 == 0o600
    assert (tmp_path / "data" / "run").stat().st_mode & 0o777 == 0o700
    assert not [where for where, text in shown.items() if node.key in text]
    assert [path for path, content in read_files(tmp_path).items() if node.key.encode() in content] == [str(file)]
