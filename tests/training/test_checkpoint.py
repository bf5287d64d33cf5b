"""What a checkpoint promises: complete or invisible, verified before use, never a silent fresh start."""

from __future__ import annotations

import errno
import json
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from ranks import kill_self, run_ranks
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Shard, distribute_tensor

from dgt.training import checkpoint, files, retention, tensor_files
from dgt.training.checkpoint import CheckpointConfig, CheckpointError
from dgt.training.pieces import Piece, Pieces, piece_of
from dgt.training.world import World, joined


@pytest.fixture
def world() -> Iterator[World]:
    with joined() as joined_world:
        yield joined_world


def weights(value: float, rows: int = 4) -> Pieces:
    return {"model.w": Piece(torch.full((rows, 3), value), (rows, 3))}


def save(folder: Path, step: int, world: World) -> str | None:
    folder.mkdir(exist_ok=True, parents=True)
    return checkpoint.save(folder, step, weights(float(step)), {"progress": {}}, world)


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_a_checkpoint_reads_back_what_was_saved(tmp_path: Path, world: World) -> None:
    assert save(tmp_path, 7, world) is None
    found = checkpoint.newest(tmp_path, print)
    assert found is not None
    assert (found.step, found.path.name) == (7, "step_00000007")
    pieces = weights(0.0)
    checkpoint.read_pieces(found, pieces, world)
    assert (pieces["model.w"].local == 7).all()
    assert set(found.manifest["files"]) == {"rank-00000.safetensors"}


@pytest.mark.parametrize("damage", ["flip", "cut", "remove", "manifest", "manifest flip", "no manifest", "nested"])
def test_a_damaged_checkpoint_is_passed_over_with_a_word_and_set_aside(
    tmp_path: Path, world: World, damage: str
) -> None:
    save(tmp_path, 1, world)
    save(tmp_path, 2, world)
    newest = tmp_path / "step_00000002"
    data = newest / "rank-00000.safetensors"
    if damage == "flip":
        content = bytearray(data.read_bytes())
        content[len(content) // 2] ^= 1
        data.write_bytes(content)
    elif damage == "cut":
        os.truncate(data, 10)
    elif damage == "remove":
        data.unlink()
    elif damage == "manifest":
        (newest / "manifest.json").write_text('{"format": 1, "st')
    elif damage == "nested":
        (newest / "manifest.json").write_text("[" * 100_000)
    elif damage == "manifest flip":
        text = (newest / "manifest.json").read_text()
        (newest / "manifest.json").write_text(text.replace('"step": 2', '"step": 6'))
    else:
        (newest / "manifest.json").unlink()
    said: list[str] = []
    found = checkpoint.newest(tmp_path, said.append)
    assert found is not None
    assert found.step == 1
    assert len(said) == 1
    assert "step_00000002" in said[0]
    assert names(tmp_path) == ["step_00000001", "step_00000002.damaged"]
    assert save(tmp_path, 2, world) is None, "the step can be saved again"


@pytest.mark.parametrize("name", ["rank-00000.safetensors", "manifest.json"])
def test_a_file_that_a_node_wrongly_remembers_as_missing_is_looked_for_again(
    tmp_path: Path, world: World, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    save(tmp_path, 1, world)
    file, hidden = tmp_path / "step_00000001" / name, tmp_path / "hidden"
    file.rename(hidden)
    monkeypatch.setattr(files.time, "sleep", lambda _: hidden.exists() and hidden.rename(file))
    found = checkpoint.newest(tmp_path, print)
    assert found is not None
    assert names(tmp_path) == ["step_00000001"]


@pytest.mark.parametrize("problem", ["input/output error", "another format"])
def test_a_checkpoint_that_cannot_be_judged_stops_the_run_and_stays_where_it_is(
    tmp_path: Path, world: World, monkeypatch: pytest.MonkeyPatch, problem: str
) -> None:
    save(tmp_path, 1, world)
    if problem == "another format":
        monkeypatch.setattr(checkpoint, "FORMAT", checkpoint.FORMAT + 1)
    else:

        def stale(_: Path) -> None:
            raise OSError(errno.ESTALE, os.strerror(errno.ESTALE))

        monkeypatch.setattr(checkpoint, "described", stale)
    with pytest.raises(CheckpointError, match=r"cannot be read now|is of checkpoint format"):
        checkpoint.newest(tmp_path, print)
    assert names(tmp_path) == ["step_00000001"]


def test_facts_of_a_step_can_be_replaced_and_its_tensors_stay(tmp_path: Path, world: World) -> None:
    save(tmp_path, 1, world)
    before = (tmp_path / "step_00000001" / "rank-00000.safetensors").stat().st_mtime_ns
    assert checkpoint.save(tmp_path, 1, {}, {"progress": {"evaluated_at": 1}}, world) is None
    found = checkpoint.newest(tmp_path, print)
    assert found is not None
    assert found.manifest["progress"] == {"evaluated_at": 1}
    assert (tmp_path / "step_00000001" / "rank-00000.safetensors").stat().st_mtime_ns == before


def test_an_old_checkpoint_that_cannot_be_removed_is_reported_and_stops_nothing(
    tmp_path: Path, world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    for step in (1, 2, 3):
        save(tmp_path, step, world)
    said: list[str] = []

    def busy(path: Path, ignore_errors: bool = False) -> None:
        if not ignore_errors:
            raise OSError(errno.ENOTEMPTY, os.strerror(errno.ENOTEMPTY))

    monkeypatch.setattr(shutil, "rmtree", busy)
    retention.prune(tmp_path, CheckpointConfig(keep_last=1), (), said.append)
    assert len(said) == 2
    assert "Directory not empty" in said[0]
    assert [p.name for p in checkpoint.committed(tmp_path)] == ["step_00000003"]


KILL_POINTS = ("write", "written", "manifest", "before the rename", "after the rename", "while pruning")


def save_and_die(folder: Path, point: str) -> None:
    """Saves steps 1 and 2, then dies at a point of saving step 3 and pruning step 1."""
    with joined() as world:
        rename, replace, write = Path.rename, os.replace, tensor_files.write
        for step in (1, 2):
            save(folder, step, world)

        def killing_write(*args: Any) -> Any:
            if point == "write":
                kill_self()
            written = write(*args)
            if point == "written":
                kill_self()
            return written

        def killing_replace(*args: Any) -> None:
            if point == "manifest":
                kill_self()
            replace(*args)

        def killing_rename(path: Path, target: Path) -> Path:
            committing = path.match("step_00000003.*.saving")
            if point == "before the rename" and committing:
                kill_self()
            result = rename(path, target)
            if (point == "after the rename" and committing) or (
                point == "while pruning" and path.name == "step_00000001"
            ):
                kill_self()
            return result

        tensor_files.write, os.replace, Path.rename = killing_write, killing_replace, killing_rename  # type: ignore
        save(folder, 3, world)
        retention.prune(folder, CheckpointConfig(keep_last=2), (), print)


@pytest.mark.parametrize("point", KILL_POINTS)
def test_a_kill_at_any_moment_of_a_save_leaves_the_newest_whole_checkpoint(tmp_path: Path, point: str) -> None:
    (result,) = run_ranks(1, save_and_die, tmp_path, point, check=False)
    assert result.exitcode == -9
    for path in checkpoint.committed(tmp_path):
        checkpoint.verify(path)  # whatever has a committed name is whole
    found = checkpoint.newest(tmp_path, print)
    assert found is not None
    assert found.step == (3 if point in ("after the rename", "while pruning") else 2)
    retention.discard_unfinished(tmp_path)
    assert all(name.startswith("step_") and "." not in name for name in names(tmp_path))


def test_no_fresh_start_where_every_checkpoint_is_damaged(tmp_path: Path, world: World) -> None:
    save(tmp_path, 1, world)
    (tmp_path / "step_00000001" / "rank-00000.safetensors").unlink()
    for _ in range(2):  # the second attempt finds only what the first has set aside
        with pytest.raises(CheckpointError, match=r"no checkpoint in .* is whole"):
            checkpoint.newest(tmp_path, lambda _: None)
    assert checkpoint.newest(tmp_path / "empty", print) is None


def test_an_unfinished_save_is_never_read_and_is_removed(tmp_path: Path, world: World) -> None:
    save(tmp_path, 1, world)
    (tmp_path / "step_00000001").rename(tmp_path / "step_00000002.saving")
    assert checkpoint.newest(tmp_path, print) is None
    retention.discard_unfinished(tmp_path)
    assert names(tmp_path) == []


def test_retention_keeps_the_newest_and_the_best(tmp_path: Path, world: World) -> None:
    for step in range(1, 7):
        save(tmp_path, step, world)
    (tmp_path / "step_00000009.saving").mkdir()
    retention.prune(tmp_path, CheckpointConfig(keep_last=2), [3, None], print)
    assert [p.name for p in checkpoint.committed(tmp_path)] == ["step_00000006", "step_00000005", "step_00000003"]


def test_other_names_or_shapes_are_refused_in_one_sentence(tmp_path: Path, world: World) -> None:
    save(tmp_path, 1, world)
    found = checkpoint.newest(tmp_path, print)
    assert found is not None
    for pieces, sentence in (
        ({"model.other": weights(0.0)["model.w"]}, "model.w and 0 others, not known here"),
        (weights(0.0) | {"model.other": weights(0.0)["model.w"]}, "model.other is not in it"),
        (weights(0.0, rows=5), r"model.w has the shape \(4, 3\) there and \(5, 3\) here"),
        ({"model.w": Piece(torch.zeros(4, 3, dtype=torch.float16), (4, 3))}, "model.w is F32 there and F16 here"),
    ):
        with pytest.raises(CheckpointError, match=f"does not fit this network or optimizer: .*{sentence}"):
            checkpoint.read_pieces(found, pieces, world)


def save_on_full_disk(folder: Path) -> tuple[str | None, str | None, list[str]]:
    """Saves step 1; fills the disk; saves step 2; frees it and saves step 3."""
    with joined() as world:
        mesh = init_device_mesh("cpu", (world.size,))
        sharded = distribute_tensor(torch.arange(3_000_000, dtype=torch.float32).view(3, -1), mesh, [Shard(0)])

        def save(step: int) -> str | None:
            return checkpoint.save(folder, step, {"w": piece_of(sharded, world.rank, world.size)}, {}, world)

        assert save(1) is None
        if world.is_main:
            free = os.statvfs(folder).f_bavail * os.statvfs(folder).f_frsize
            (folder / "filler").write_bytes(bytes(free - 6_000_000))
        world.barrier()
        failed = save(2)
        left = names(folder)
        world.barrier()
        if world.is_main:
            (folder / "filler").unlink()
        world.barrier()
        return failed, save(3), left


def test_a_full_disk_fails_the_save_on_every_rank_and_keeps_the_previous_one(small_disk: Path) -> None:
    for result in run_ranks(2, save_on_full_disk, small_disk):
        failed, later, left = result.value
        assert failed is not None
        assert "checkpoint of step 2 could not be written" in failed
        assert "MB free)" in failed
        assert later is None
    assert "step_00000001" in left
    assert [p.name for p in checkpoint.committed(small_disk)] == ["step_00000003", "step_00000001"]
    assert checkpoint.verify(small_disk / "step_00000001").step == 1


def sharded_save(folder: Path) -> None:
    with joined() as world:
        mesh = init_device_mesh("cpu", (world.size,))
        tensor = distribute_tensor(torch.arange(35.0).view(7, 5), mesh, [Shard(0)])
        assert checkpoint.save(folder, 1, {"w": piece_of(tensor, world.rank, world.size)}, {}, world) is None


def sharded_load(folder: Path) -> torch.Tensor:
    with joined() as world:
        mesh = init_device_mesh("cpu", (world.size,))
        tensor = distribute_tensor(torch.zeros(7, 5), mesh, [Shard(0)])
        found = world.on_main(lambda: checkpoint.newest(folder, print))
        assert found is not None
        checkpoint.read_pieces(found, {"w": piece_of(tensor, world.rank, world.size)}, world)
        return tensor.full_tensor()


@pytest.mark.parametrize(("saved_by", "loaded_by"), [(2, 3), (3, 1)])
def test_any_number_of_ranks_reads_what_another_number_has_saved(tmp_path: Path, saved_by: int, loaded_by: int) -> None:
    run_ranks(saved_by, sharded_save, tmp_path)
    manifest: dict[str, Any] = json.loads((tmp_path / "step_00000001" / "manifest.json").read_text())
    assert set(manifest["files"]) == {f"rank-{rank:05d}.safetensors" for rank in range(saved_by)}
    for result in run_ranks(loaded_by, sharded_load, tmp_path):
        assert torch.equal(result.value, torch.arange(35.0).view(7, 5))
