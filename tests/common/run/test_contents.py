"""Test that no file of the user is lost in an output folder, whatever a run writes."""

from common.run.contents import COPIES, copy_aside, files_in, give_back, move_run


def write(folder, **texts) -> None:
    for name, text in texts.items():
        (folder / name.replace("__", "/")).parent.mkdir(parents=True, exist_ok=True)
        (folder / name.replace("__", "/")).write_text(text)


def read(folder) -> dict[str, str]:
    return {name: (folder / name).read_text() for name in files_in(folder)}


def test_overwritten_and_removed_files_come_back_under_another_name(tmp_path):
    write(tmp_path, same="mine", changed="mine", removed="mine", inner__changed="mine")
    copy_aside(tmp_path, list(files_in(tmp_path)))
    assert set(read(tmp_path)) == {"same", "changed", "removed", "inner/changed"}  # copies do not count
    write(tmp_path, changed="of the run", inner__changed="of the run", new="of the run")
    (tmp_path / "removed").unlink()
    beside = {"changed": "changed.yours", "removed": "removed.yours", "inner/changed": "inner/changed.yours"}
    assert give_back(tmp_path) == beside
    assert read(tmp_path) == {
        "same": "mine", "changed": "of the run", "inner/changed": "of the run", "new": "of the run",
        **dict.fromkeys(beside.values(), "mine"),
    }  # fmt: skip
    assert not (tmp_path / COPIES).exists()
    assert give_back(tmp_path) == {}


def test_a_resumed_run_keeps_the_copies_of_its_first_start(tmp_path):
    write(tmp_path, a="mine")
    copy_aside(tmp_path, ["a"])
    write(tmp_path, a="of the stopped run", b="mine too")
    (tmp_path / COPIES / "b.1.part").write_text("ha")  # of a process that was killed while it copied
    copy_aside(tmp_path, ["a", "b"])
    write(tmp_path, a="of the resumed run", b="of the resumed run", **{"a.yours": "earlier"})
    assert give_back(tmp_path) == {"a": "a.yours2", "b": "b.yours"}
    assert [read(tmp_path)[name] for name in ("a.yours", "a.yours2", "b.yours")] == ["earlier", "mine", "mine too"]


def test_a_run_that_moves_replaces_no_file_of_the_user(tmp_path):
    out, previous = tmp_path / "out", tmp_path / "out.previous"
    write(out, **{"run.json": "{}"}, scores="of the run", own="mine")
    write(out, **{"checkpoint-1__state": "x"})
    write(previous, scores="mine")
    move_run(out, {"files": ["scores", "../x"]}, previous, with_checkpoints=False)
    assert read(previous) == {"scores": "of the run", "scores.yours": "mine"}
    assert read(out) == {"own": "mine"}
    assert (previous / "run.json").is_file()
    assert (out / "checkpoint-1" / "state").is_file()
