"""`export --push-to-hub`: huggingface_hub's own client, in a process of its own, against a stand-in hub."""

from __future__ import annotations

import json
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from adapter_runs import write_run
from gguf_tokenizers import byte_level_bpe
from hub_server import TOKEN, Hub, serve_hub
from ruamel.yaml import YAML
from tiny_runs import child_environment

from qlora_train.errors import ExportError
from qlora_train.export import export
from qlora_train.export.model_card import model_card
from qlora_train.recipe import load_recipe


@pytest.fixture
def hub() -> Iterator[Hub]:
    with serve_hub() as server:
        yield server


def push(
    run: Path, endpoint: str, *options: str, token: str | None = TOKEN, repo: str = "me/mine", **env: str
):
    """The command's process. It has no login but `token`, and uploads without xet, which has no stand-in."""
    environment = child_environment(
        HF_ENDPOINT=endpoint,
        HF_HOME=str(run.parent / "hf"),
        HF_HUB_DISABLE_XET="1",
        HF_HUB_OFFLINE="0",
        NO_PROXY="127.0.0.1",
    )
    environment = {name: value for name, value in environment.items() if "TOKEN" not in name}
    environment |= ({"HF_TOKEN": token} if token else {}) | env
    command = [sys.executable, "-m", "qlora_train", "export", str(run), "--push-to-hub", repo, *options]
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)


@pytest.mark.parametrize("to", ["adapter", "merged", "gguf"])
def test_the_folders_bytes_arrive_and_nothing_private(tmp_path: Path, hub: Hub, to: str) -> None:
    run = write_run(tmp_path, tokenizer=byte_level_bpe() if to == "gguf" else None, quantization="none")
    (tmp_path / "base" / "README.md").write_text("---\nlicense: mit\nmetrics: [x]\n---\n# The base\n")
    config = tmp_path / "base" / "config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"_name_or_path": str(tmp_path)}))
    out = tmp_path / "out"
    receipt = [] if to == "adapter" else ["--receipt", "none"]
    done = push(run, hub.address, "--to", to, "--out", str(out), *receipt)
    assert done.returncode == 0, done.stderr
    assert f"on the hub: {hub.address}/me/mine" in done.stdout
    visibility, files = hub.repositories["me/mine"]
    assert visibility == "private"
    del files[".gitattributes"]
    assert files == {str(p.relative_to(out)): p.read_bytes() for p in out.rglob("*") if p.is_file()}
    everything = b"".join(files.values())
    assert str(tmp_path).encode() not in everything and b"secret" not in everything
    front = YAML(typ="safe").load(files["README.md"].decode().split("---\n")[1])
    assert front["pipeline_tag"] == "text-generation" and front["license"] == "mit"
    assert front.get("library_name") == {"adapter": "peft", "merged": "transformers", "gguf": None}[to]
    assert "metrics" not in front and "base_model" not in front  # the base is not on the hub


def test_the_card_names_a_base_of_the_hub(tmp_path: Path) -> None:
    run = write_run(tmp_path)
    recipe = load_recipe(run / "recipe.yaml", ["model.base=Org/Base-2.5-7B"])
    snapshot = tmp_path / "models--Org--Base-2.5-7B" / "snapshots" / "abc"
    for to, relation in (("adapter", "adapter"), ("merged", "finetune"), ("gguf", "finetune")):
        front = YAML(typ="safe").load(model_card(recipe, snapshot, to, "").split("---\n")[1])
        assert (front["base_model"], front["base_model_relation"]) == ("Org/Base-2.5-7B", relation)


def test_an_empty_repository_is_filled_and_one_with_files_is_refused(tmp_path: Path, hub: Hub) -> None:
    run = write_run(tmp_path)
    hub.repositories["me/mine"] = ("public", {".gitattributes": b""})
    done = push(run, hub.address, "--to", "adapter")
    assert done.returncode == 0, done.stderr
    assert hub.repositories["me/mine"][0] == "public" and "README.md" in hub.repositories["me/mine"][1]
    assert "me/mine is there and public" in done.stdout
    before, count = dict(hub.repositories["me/mine"][1]), len(hub.requests)
    done = push(run, hub.address, "--to", "adapter", "--out", str(tmp_path / "again"))
    assert done.returncode == 2 and "has files already" in done.stderr and "another name" in done.stderr
    assert hub.repositories["me/mine"][1] == before
    assert not any(request.startswith(("POST", "PUT")) for request in hub.requests[count:])
    assert not (tmp_path / "again").exists()


def test_a_failed_upload_says_where_the_export_is_and_how_to_go_on(tmp_path: Path, hub: Hub) -> None:
    run = write_run(tmp_path)
    for part in ("/repos/create", "/commit/"):
        hub.fails_at, out = part, tmp_path / part.replace("/", "-")
        done = push(run, hub.address, "--to", "adapter", "--out", str(out))
        assert done.returncode == 2 and "Traceback" not in done.stderr, part
        assert f"{out}: the export is complete there" in done.stderr
        assert f"hf upload me/mine {out} --private" in done.stderr
        assert (out / "adapter_model.safetensors").is_file()


def test_what_cannot_be_pushed_is_refused_before_the_export(tmp_path: Path, hub: Hub) -> None:
    run = write_run(tmp_path)
    with socket.create_server(("127.0.0.1", 0)) as closed:
        nobody = f"http://127.0.0.1:{closed.getsockname()[1]}"
    for message, done in {
        "hf auth login": push(run, hub.address, "--to", "adapter", token=None),
        "Invalid user token": push(run, hub.address, "--to", "adapter", token="hf_wrong"),
        "Check token and network": push(run, nobody, "--to", "adapter"),
        "offline mode": push(run, hub.address, "--to", "adapter", HF_HUB_OFFLINE="1"),
    }.items():
        assert done.returncode == 2 and message in done.stderr and "Traceback" not in done.stderr
        assert done.stderr.count("\n") == 1
    assert not (run / "adapter-peft").exists() and not hub.repositories


@pytest.mark.parametrize("repo", ["a/b/c", "me/--mine", "me/my model", "mine", ""])
def test_a_malformed_name_is_refused_before_the_export(tmp_path: Path, repo: str) -> None:
    with pytest.raises(ExportError, match="--push-to-hub"):
        export(tmp_path / "no run", to="adapter", push_to_hub=repo)
