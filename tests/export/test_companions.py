"""Small files of the base that go with a merged model."""

from __future__ import annotations

from pathlib import Path

from qlora_train.export.merge import _copy_companions


def test_links_of_the_base_are_followed_to_its_own_files_only(tmp_path: Path) -> None:
    secret, hub = tmp_path / "secret", tmp_path / "models--x--y"
    base, out = hub / "snapshots" / "abc", tmp_path / "merged"
    for folder in (secret, base / "additional_chat_templates", hub / "blobs", out):
        folder.mkdir(parents=True)
    (secret / "id_rsa.txt").write_text("SECRET")
    (hub / "blobs" / "1").write_text("{}")
    (base / "tokenizer.json").symlink_to("../../blobs/1")
    (base / "notes.txt").symlink_to(secret / "id_rsa.txt")
    (base / "gone.txt").symlink_to(secret / "gone")
    (base / "additional_chat_templates" / "tools.jinja").write_text("x")
    (base / "additional_chat_templates" / "key.txt").symlink_to(secret / "id_rsa.txt")
    (base / "additional_chat_templates" / "loop").symlink_to("..")
    _copy_companions(base, out)
    copied = sorted(str(file.relative_to(out)) for file in out.rglob("*") if file.is_file())
    assert copied == ["additional_chat_templates/tools.jinja", "tokenizer.json"]
