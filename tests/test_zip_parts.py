import zipfile

import pytest

from training.data import zip_parts
from training.data.images import BadImage
from training.data.zip_parts import ZipParts, find_parts


def write(path, members, **options):
    path.parent.mkdir(parents=True, exist_ok=True)
    with zipfile.ZipFile(path, "w", **options) as archive:
        for name, content in members.items():
            archive.writestr(name, content)


def refused(call, match):
    with pytest.raises(BadImage, match=match) as caught:
        call()
    assert caught.value.reason == "archive"


def test_parts_are_found_by_number_at_any_depth(tmp_path):
    for name in ("images/part-000001.zip", "diffusiondb-large-part-1/part-000001.zip", "part-014000.zip"):
        write(tmp_path / name, {})
    (tmp_path / "part-000002.zip.tmp").write_bytes(b"")  # a download under way
    (tmp_path / "part-two.zip").write_bytes(b"")
    assert find_parts(tmp_path) == {
        1: ["diffusiondb-large-part-1/part-000001.zip", "images/part-000001.zip"],
        14_000: ["part-014000.zip"],
    }


@pytest.mark.parametrize("compression", [zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED])
def test_members_are_found_by_file_name_and_read(tmp_path, compression):
    write(tmp_path / "part-000001.zip", {"a.png": b"A" * 99, "part-000001/b.png": b"B"}, compression=compression)
    with ZipParts(tmp_path) as parts:
        members = parts.members("part-000001.zip")
        assert members == {"a.png": "a.png", "b.png": "part-000001/b.png"}
        assert [parts.read("part-000001.zip", m) for m in members.values()] == [b"A" * 99, b"B"]
        refused(lambda: parts.read("part-000001.zip", "c.png"), r"part-000001\.zip/c\.png: is not in the zip file")
        parts.close()
        assert parts.read("part-000001.zip", "a.png") == b"A" * 99  # opened again


def test_few_zip_files_stay_open(tmp_path, monkeypatch):
    monkeypatch.setattr(zip_parts, "KEPT_OPEN", 2)
    names = [f"part-{i:06d}.zip" for i in range(5)]
    for name in names:
        write(tmp_path / name, {"a": name})
    with ZipParts(tmp_path) as parts:
        for name in [*names, *names[::-1]]:
            assert parts.read(name, "a") == name.encode()
            assert len(parts._open) <= 2


def test_damage_is_refused_by_checksum(tmp_path):
    path = tmp_path / "part-000001.zip"
    write(path, {"a.png": b"A" * 99, "b.png": b"B" * 99})
    path.write_bytes(path.read_bytes().replace(b"A" * 99, b"A" * 98 + b"X"))
    with ZipParts(tmp_path) as parts:
        refused(lambda: parts.read("part-000001.zip", "a.png"), "Bad CRC-32")
        assert parts.read("part-000001.zip", "b.png") == b"B" * 99  # its neighbour is whole


def test_files_that_are_no_zip_files_are_refused(tmp_path):
    write(tmp_path / "whole.zip", {"a.png": b"A" * 99})
    whole = (tmp_path / "whole.zip").read_bytes()
    for i, content in enumerate((b"", b"text", whole[:-10], whole[:20])):
        (tmp_path / f"{i}.zip").write_bytes(content)
        refused(lambda name=f"{i}.zip": ZipParts(tmp_path).members(name), rf"^{i}\.zip: cannot be opened as a zip file")
    refused(lambda: ZipParts(tmp_path).members("none.zip"), "No such file")


def test_a_zip_bomb_is_not_unpacked(tmp_path, monkeypatch):
    monkeypatch.setattr(zip_parts, "MAX_BYTES", 10_000)
    write(tmp_path / "a.zip", {"a.png": bytes(10_001), "b.png": bytes(10_000)}, compression=zipfile.ZIP_DEFLATED)
    with ZipParts(tmp_path) as parts:
        refused(lambda: parts.read("a.zip", "a.png"), "would unpack to 10001 bytes, more than 10000")
        assert len(parts.read("a.zip", "b.png")) == 10_000
