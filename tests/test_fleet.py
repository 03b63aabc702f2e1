"""The archive generator: its account of what it wrote is true to the byte, and the same every time."""

import os

import pytest

import fleet


PARTS = ("cut_glued", "glued", "nul_front")     # of a line, whose rest is good


@pytest.fixture(scope="module")
def archive(tmp_path_factory):
    directory = tmp_path_factory.mktemp("archive")
    return str(directory), fleet.make_archive(str(directory), units=20, days=14, seed=1)


def content(root, truth):
    with open(os.path.join(root, *truth.path.split("/")), "rb") as file:
        return file.read()


def all_files(root):
    return {os.path.relpath(os.path.join(directory, name), root).replace(os.sep, "/")
            for directory, _, names in os.walk(root) for name in names}


def test_every_file_is_in_the_manifest(archive):
    root, manifest = archive
    assert all_files(root) == {truth.path for truth in manifest.files} | {"manifest.json"}


def test_the_manifest_adds_up_byte_for_byte_with_the_files(archive):
    root, manifest = archive
    for truth in manifest.files:
        data = content(root, truth)
        assert len(data) == truth.size == sum(truth.sizes.values()) + truth.tail
        assert data.count(b"\n") == sum(truth.lines.values())
        assert len(data) - (data.rfind(b"\n") + 1) == truth.tail


def test_marks_point_at_whole_lines_and_are_counted(archive):
    root, manifest = archive
    for truth in manifest.files:
        data = content(root, truth)
        for mark in truth.marks:
            assert mark.offset == 0 or data[mark.offset - 1:mark.offset] == b"\n"
            assert data[:mark.offset].count(b"\n") == mark.line - 1
            if mark.kind not in PARTS:
                assert data[mark.offset:mark.offset + mark.length].find(b"\n") == mark.length - 1
        for cls in (fleet.REPEATED, fleet.REJECTED, fleet.IGNORED, fleet.EITHER):
            kinds = truth.kinds(cls)
            assert sum(kinds.values()) - sum(kinds.get(kind, 0) for kind in PARTS) == truth.lines[cls]


def test_good_lines_hold_together_and_differ_and_repeats_repeat_them(archive):
    root, manifest = archive
    for truth in manifest.of("readings"):
        classes = {mark.line: mark.cls for mark in truth.marks}
        lines = content(root, truth)[:truth.size - truth.tail].split(b"\n")[:-1]
        good = [line for number, line in enumerate(lines, 1) if classes.get(number, "good") == "good"]
        assert len(set(good)) == len(good)
        assert {line.split(b"\t")[0].decode() for line in good} == {truth.unit_id}
        assert {len(line.split(b"\t")) for line in good} <= {16, 21, 23}
        assert {line for number, line in enumerate(lines, 1) if classes.get(number) == "repeated"} <= set(good)


def test_every_kind_of_dirt_is_somewhere(archive):
    _, manifest = archive
    marked = {mark.kind for truth in manifest.files for mark in truth.marks}
    assert set(fleet.DIRT) - marked == {"tail", "ping_tail", "error_tail"}
    assert all(any(truth.tail for truth in manifest.of(what)) for what in ("readings", "pings", "errors"))


def test_files_are_followed_by_new_ones_at_102400_bytes(archive):
    _, manifest = archive
    sizes = [truth.size for truth in manifest.of("readings") if truth.path.endswith("-0000.tsv")]
    assert len(sizes) == 20 and max(sizes) < 102400 + 600
    items = [fleet.Item("x" * 1023 + "\n")] * 250
    assert [len(batch) for batch in fleet.split_files(items)] == [100, 100, 50]


def test_the_same_seed_gives_the_same_bytes_and_the_manifest_can_be_loaded(archive, tmp_path):
    root, manifest = archive
    again = fleet.make_archive(str(tmp_path), units=20, days=14, seed=1)
    assert again == manifest == fleet.Manifest.load(os.path.join(root, "manifest.json"))
    assert all(content(root, truth) == content(str(tmp_path), truth) for truth in manifest.files)


def test_a_clean_archive_has_only_good_lines(tmp_path):
    manifest = fleet.make_archive(str(tmp_path), units=5, days=3, dirt=())
    assert {mark.cls for truth in manifest.files for mark in truth.marks} == {fleet.IGNORED}
    assert not any(truth.tail for truth in manifest.files)
    assert manifest.lines("readings", fleet.GOOD) == sum(unit.readings for unit in manifest.units)
    assert manifest.lines("pings", fleet.GOOD) == sum(unit.pings for unit in manifest.units)


@pytest.mark.parametrize("kind", fleet.DIRT)
def test_each_kind_of_dirt_can_be_had_alone(kind, tmp_path):
    manifest = fleet.make_archive(str(tmp_path), units=2, days=2, dirt=[kind])
    marked = {mark.kind for truth in manifest.files for mark in truth.marks if mark.cls != fleet.IGNORED}
    assert marked | {name for name in (kind,) if kind.endswith("tail")} == {kind}
    assert kind.endswith("tail") == any(truth.tail for truth in manifest.files)


def test_the_command_writes_and_refuses_a_directory_in_use(tmp_path, capsys):
    target = str(tmp_path / "archive")
    assert fleet.main([target, "--units", "2", "--days", "1", "--clean"]) == 0
    assert capsys.readouterr().out.startswith("readings       2 files: 94 good lines\n")
    assert fleet.main([target]) == 1
