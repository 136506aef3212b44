"""`export --push-to-hub`: huggingface_hub's own client, in a process of its own, against a stand-in hub. It
reads its settings when it is imported, so commands that have the same share a process.
"""

from __future__ import annotations

import json
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

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


COMMANDS = """
import contextlib, io, json, sys
from qlora_train.cli import main

for arguments in json.loads(sys.argv[1]):
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        code = main(arguments)
    print(json.dumps([code, out.getvalue(), err.getvalue()]))
"""


class Ended(NamedTuple):
    """A command that has ended, with what it wrote."""

    code: int
    out: str
    err: str


def push(
    endpoint: str, *exports: tuple[Path, str, list[str]], token: str | None = TOKEN, **env: str
) -> list[Ended]:
    """Push each (run, repository, options), one after the other in one process. It has no login but `token`,
    uses no proxy, and uploads without xet, which has no stand-in."""
    environment = child_environment(
        HF_ENDPOINT=endpoint,
        HF_HOME=str(exports[0][0].parent / "hf"),
        HF_HUB_DISABLE_XET="1",
        HF_HUB_OFFLINE="0",
    )
    private = ("TOKEN", "PROXY")
    environment = {k: v for k, v in environment.items() if not any(part in k.upper() for part in private)}
    environment |= ({"HF_TOKEN": token} if token else {}) | env
    commands = [["export", str(run), "--push-to-hub", repo, *options] for run, repo, options in exports]
    done = subprocess.run(
        [sys.executable, "-c", COMMANDS, json.dumps(commands)],
        env=environment, capture_output=True, text=True, timeout=300,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return [Ended(*json.loads(line)) for line in done.stdout.splitlines()]


def test_the_folders_bytes_arrive_and_nothing_private(tmp_path: Path, hub: Hub) -> None:
    kinds = ("adapter", "merged", "gguf")
    exports = []
    for to in kinds:
        home = tmp_path / to
        run = write_run(home, tokenizer=byte_level_bpe() if to == "gguf" else None, quantization="none")
        (home / "base" / "README.md").write_text("---\nlicense: mit\nmetrics: [x]\n---\n# The base\n")
        config = home / "base" / "config.json"
        config.write_text(json.dumps(json.loads(config.read_text()) | {"_name_or_path": str(tmp_path)}))
        receipt = [] if to == "adapter" else ["--receipt", "none"]
        exports.append((run, f"me/{to}", ["--to", to, "--out", str(home / "out"), *receipt]))
    for to, done in zip(kinds, push(hub.address, *exports), strict=True):
        assert done.code == 0, done.err
        assert f"on the hub: {hub.address}/me/{to}" in done.out
        visibility, files = hub.repositories[f"me/{to}"]
        assert visibility == "private"
        del files[".gitattributes"]
        out = tmp_path / to / "out"
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


def test_a_folder_of_data_that_is_gone_is_named_by_its_last_part(tmp_path: Path) -> None:
    recipe = load_recipe(write_run(tmp_path) / "recipe.yaml", ["data.train=customer/letters"])
    card = model_card(recipe, tmp_path / "base", "adapter", "")
    assert "- data: letters\n" in card and "customer" not in card


def test_an_empty_repository_is_filled_and_one_with_files_is_refused(tmp_path: Path, hub: Hub) -> None:
    run = write_run(tmp_path)
    hub.repositories["me/mine"] = ("public", {".gitattributes": b""})
    again = tmp_path / "again"
    exports = [
        (run, "me/mine", ["--to", "adapter"]),
        (run, "me/mine", ["--to", "adapter", "--out", str(again)]),
    ]
    filled, refused = push(hub.address, *exports)
    assert filled.code == 0, filled.err
    assert hub.repositories["me/mine"][0] == "public" and "README.md" in hub.repositories["me/mine"][1]
    assert "me/mine is there and public" in filled.out
    assert refused.code == 2 and "has files already" in refused.err and "another name" in refused.err
    assert len([request for request in hub.requests if "/commit/" in request]) == 1
    assert hub.requests[-1] == "GET /api/models/me/mine"  # the second command only looked
    assert not again.exists()


def test_a_failed_upload_says_where_the_export_is_and_how_to_go_on(tmp_path: Path, hub: Hub) -> None:
    run, outs = write_run(tmp_path), [tmp_path / "not-created", tmp_path / "not-committed"]
    hub.fails_at = ["/repos/create", "/commit/"]
    exports = [(run, "me/mine", ["--to", "adapter", "--out", str(out)]) for out in outs]
    for out, done in zip(outs, push(hub.address, *exports), strict=True):
        assert done.code == 2 and "Traceback" not in done.err, out
        assert f"{out}: the export is complete there" in done.err
        assert f"hf upload me/mine {out} --private" in done.err
        assert (out / "adapter_model.safetensors").is_file()
    assert not hub.fails_at  # both have happened


def test_what_cannot_be_pushed_is_refused_before_the_export(tmp_path: Path, hub: Hub) -> None:
    run = write_run(tmp_path)
    asked = (run, "me/mine", ["--to", "adapter"])
    with socket.create_server(("127.0.0.1", 0)) as closed:
        nobody = f"http://127.0.0.1:{closed.getsockname()[1]}"
    for message, (done,) in {
        "hf auth login": push(hub.address, asked, token=None),
        "Invalid user token": push(hub.address, asked, token="hf_wrong"),
        "Check token and network": push(nobody, asked),
        "offline mode": push(hub.address, asked, HF_HUB_OFFLINE="1"),
    }.items():
        assert done.code == 2 and message in done.err and "Traceback" not in done.err
        assert done.err.count("\n") == 1
    assert not (run / "adapter-peft").exists() and not hub.repositories


@pytest.mark.parametrize("repo", ["a/b/c", "me/--mine", "me/my model", "mine", ""])
def test_a_malformed_name_is_refused_before_the_export(tmp_path: Path, repo: str) -> None:
    with pytest.raises(ExportError, match="--push-to-hub"):
        export(tmp_path / "no run", to="adapter", push_to_hub=repo)
