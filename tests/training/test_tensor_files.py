"""Tensors in files: bits preserved whatever the number of ranks, and no header believed that contradicts its file."""

from __future__ import annotations

import json
import math
import resource
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from ranks import run_ranks
from safetensors import safe_open
from torch import Tensor

from dgt.training import files, tensor_files
from dgt.training.pieces import Piece, Pieces
from dgt.training.tensor_files import TensorFileError, TensorFiles
from launch import export

NAN_WITH_PAYLOAD = struct.unpack("<i", struct.pack("<I", 0x7FC01234))[0]


def odd_tensors() -> dict[str, Tensor]:
    """Shapes and values that a careless format loses."""
    payloads = torch.tensor([NAN_WITH_PAYLOAD, -0x7FFFFF, 0, -(2**31)], dtype=torch.int32).view(torch.float32)
    return {
        "odd": torch.arange(35.0).view(7, 5),
        "fewer_rows_than_ranks": torch.arange(9.0).view(1, 9),
        "nothing": torch.zeros(0, 4),
        "number": torch.tensor(3.25, dtype=torch.float64),
        "half": torch.linspace(-1, 1, 11).to(torch.bfloat16),
        "special": torch.cat([payloads, torch.tensor([-0.0, math.inf, -math.inf, 5e-324])]),
        "flags": torch.tensor([True, False, True]),
        "count": torch.tensor(2**40 + 1),
    }


def bits(tensor: Tensor) -> bytes:
    return bytes(tensor_files.as_bytes(tensor))


def rows_of(tensor: Tensor, rank: int, world_size: int) -> Piece:
    """As FSDP2 cuts: the first ranks get ceil(rows / ranks) rows, the last ones fewer or none."""
    if tensor.dim() == 0:
        return Piece(tensor.clone(), (), 0, rank, world_size)
    size = -(-tensor.shape[0] // world_size)
    first = min(rank * size, tensor.shape[0])
    part = tensor[first : first + size].clone()
    return Piece(part, tuple(tensor.shape), first * math.prod(tensor.shape[1:]))


def flat_of(tensor: Tensor, rank: int, world_size: int) -> Piece:
    """As ZeRO cuts: anywhere."""
    count = tensor.numel()
    first, last = (count * i // world_size for i in (rank, rank + 1))
    return Piece(tensor.reshape(-1)[first:last].clone(), tuple(tensor.shape), first)


def whole_of(tensor: Tensor, rank: int, world_size: int) -> Piece:
    return Piece(tensor.clone(), tuple(tensor.shape), 0, rank, world_size)


CUTS = {"whole": whole_of, "rows": rows_of, "flat": flat_of}


def saved(folder: Path, cut: Callable[..., Piece], world_size: int, tensors: dict[str, Tensor]) -> TensorFiles:
    folder.mkdir(exist_ok=True)
    paths = [folder / f"rank-{rank}" for rank in range(world_size)]
    for rank, path in enumerate(paths):
        pieces = {name: cut(tensor, rank, world_size) for name, tensor in tensors.items()}
        assert tensor_files.write(path, pieces) == files.described(path)
    return TensorFiles(paths, tensor_files.describe(pieces))


@pytest.mark.parametrize("saved_by", [1, 2, 3])
@pytest.mark.parametrize("cut", CUTS)
def test_no_bit_changes_from_any_cut_and_number_of_ranks_to_any_other(tmp_path: Path, saved_by: int, cut: str) -> None:
    tensors = odd_tensors()
    stored = saved(tmp_path, CUTS[cut], saved_by, tensors)
    for name, tensor in tensors.items():
        assert bits(stored.whole(name)) == bits(tensor), name
        assert (stored.whole(name).shape, stored.whole(name).dtype) == (tensor.shape, tensor.dtype)
    for other in CUTS.values():
        for ranks in (1, 2, 3):
            for rank in range(ranks):
                expected: Pieces = {name: other(tensor, rank, ranks) for name, tensor in tensors.items()}
                loaded = {name: other(torch.zeros_like(tensor), rank, ranks) for name, tensor in tensors.items()}
                stored.fill(loaded)
                for name in tensors:
                    assert bits(loaded[name].local) == bits(expected[name].local), (name, rank, ranks)


def test_each_file_is_a_safetensors_file_for_others_too(tmp_path: Path) -> None:
    saved(tmp_path, rows_of, 2, odd_tensors())
    with safe_open(tmp_path / "rank-1", "pt") as file:
        assert torch.equal(file.get_tensor("odd:20"), torch.arange(20.0, 35.0))


def header(path: Path) -> dict[str, Any]:
    content = path.read_bytes()
    return json.loads(content[8 : 8 + int.from_bytes(content[:8], "little")])


def rewrite(path: Path, found: Any) -> None:
    """Gives a file another header, of any length, and leaves its data as they are."""
    content = path.read_bytes()
    text = found if isinstance(found, bytes) else json.dumps(found).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + content[8 + int.from_bytes(content[:8], "little") :])


def entry(**changes: Any) -> dict[str, Any]:
    return {"dtype": "F32", "shape": [6], "data_offsets": [0, 24]} | changes


LIES = {
    "no JSON": (b"{", "its header is not JSON"),
    "deeper than any": (b"[" * 100_000, "its header is not JSON"),
    "a list": ([], "its header names no tensors"),
    "an entry that is none": ({"w:0": 5}, "is not a known dtype and a shape"),
    "an unknown dtype": ({"w:0": entry(dtype="F128")}, "is not a known dtype and a shape"),
    "a negative size": ({"w:0": entry(shape=[-6])}, "is not a known dtype and a shape"),
    "a size that is none": ({"w:0": entry(shape=[6.0])}, "is not a known dtype and a shape"),
    "no place": ({"w:0": {"dtype": "F32", "shape": [6]}}, "has no place in it"),
    "a place before the data": ({"w:0": entry(data_offsets=[-8, 16])}, "has no place in it"),
    "a place after the end": ({"w:0": entry(shape=[60], data_offsets=[0, 240])}, "does not lie within w"),
    "data cut off": ({"w:0": entry(data_offsets=[4, 28])}, "contradicts its shape or its neighbours"),
    "fewer bytes than elements": ({"w:0": entry(data_offsets=[0, 20])}, "contradicts its shape or its neighbours"),
    "another dtype than the manifest's": ({"w:0": entry(dtype="I32")}, "does not lie within w of the manifest"),
    "a start beyond the tensor": ({"w:3": entry()}, "does not lie within w of the manifest"),
    "a start that is no number": ({"w:x": entry()}, "is no piece of a tensor that the manifest names"),
    "a negative start": ({"w:-1": entry()}, "is no piece of a tensor that the manifest names"),
    "a foreign name": ({"v:0": entry()}, "is no piece of a tensor that the manifest names"),
    "elements twice": (
        {"w:0": entry(shape=[4], data_offsets=[0, 16]), "w:2": entry(shape=[2], data_offsets=[16, 24])},
        "holds elements of w that another place holds, too",
    ),
    "the same bytes twice": (
        {"w:0": entry(shape=[3], data_offsets=[0, 12]), "w:3": entry(shape=[3], data_offsets=[0, 12])},
        "contradicts its shape or its neighbours",
    ),
    "elements missing": ({"w:0": entry(shape=[4], data_offsets=[0, 16])}, "the elements from 4 on are in none"),
    "nothing at all": ({}, "the elements from 0 on are in none"),
}


@pytest.mark.parametrize("lie", LIES)
def test_a_header_that_lies_is_refused_in_one_sentence(tmp_path: Path, lie: str) -> None:
    path, tensors = tmp_path / "rank-0", {"w": torch.arange(6.0)}
    stored = saved(tmp_path, whole_of, 1, tensors)
    assert header(path) == {"w:0": entry()}
    found, sentence = LIES[lie]
    rewrite(path, found)
    with pytest.raises(TensorFileError, match=sentence):
        TensorFiles([path], stored.tensors)


@pytest.mark.parametrize("content", [b"", b"\0" * 7, b"\xff" * 64, (2**40).to_bytes(8, "little") + b"{}"])
def test_what_is_no_safetensors_file_is_refused_and_takes_no_memory(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "rank-0"
    path.write_bytes(content)
    with pytest.raises(TensorFileError, match="is no safetensors file"):
        TensorFiles([path], {"w": {"dtype": "F32", "shape": [6]}})


@pytest.mark.parametrize(
    "whole", [{}, {"dtype": "F32"}, {"dtype": "object", "shape": []}, {"dtype": "F32", "shape": [-1]}]
)
def test_a_manifest_whose_tensors_are_none_is_refused(whole: Any) -> None:
    with pytest.raises(TensorFileError, match="is not a known dtype and a shape"):
        TensorFiles([], {"w": whole})


def test_a_tensor_of_impossible_size_is_refused_before_memory_is_asked_for(tmp_path: Path) -> None:
    saved(tmp_path, whole_of, 1, {"w": torch.arange(6.0)})
    with pytest.raises(TensorFileError, match="the elements from 6 on are in none of the files"):
        TensorFiles([tmp_path / "rank-0"], {"w": {"dtype": "F32", "shape": [2**60]}})


def test_a_file_cut_after_it_was_opened_is_noticed(tmp_path: Path) -> None:
    stored = saved(tmp_path, whole_of, 1, {"w": torch.arange(6.0)})
    (tmp_path / "rank-0").write_bytes((tmp_path / "rank-0").read_bytes()[:-3])
    with pytest.raises(TensorFileError, match="ends too early"):
        stored.whole("w")


def test_a_file_that_another_node_has_just_made_is_waited_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    now, made = [0.0], tmp_path / "made"

    def sleep(seconds: float) -> None:
        now[0] += seconds
        if now[0] > 40 and not made.exists():
            made.write_bytes(b"12345")

    monkeypatch.setattr(files.time, "sleep", sleep)
    monkeypatch.setattr(files.time, "monotonic", lambda: now[0])
    files.await_sizes(tmp_path, {"made": 5})
    assert 40 < now[0] < 45
    with pytest.raises(OSError, match="not seen here with the 6 bytes that another rank wrote"):
        files.await_sizes(tmp_path, {"made": 6})
    assert files.PATIENCE <= now[0] < files.PATIENCE + 45
    with pytest.raises(FileNotFoundError):
        files.patiently(lambda: (tmp_path / "never").stat())


def test_files_that_stay_away_cost_the_wait_for_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    now = [0.0]
    (tmp_path / "7").write_bytes(b"x")

    def sleep(seconds: float) -> None:
        now[0] += seconds
        if now[0] > 60:
            (tmp_path / "0").write_bytes(b"x")

    monkeypatch.setattr(files.time, "sleep", sleep)
    monkeypatch.setattr(files.time, "monotonic", lambda: now[0])
    with pytest.raises(FileNotFoundError):
        files.await_sizes(tmp_path, {str(number): 1 for number in range(8)})
    assert 60 < now[0] <= files.PATIENCE


def test_a_rename_whose_answer_was_lost_counts_as_done(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "a").mkdir()
    rename = Path.rename

    def asked_twice(path: Path, to: Path) -> None:
        rename(path, to)
        rename(path, to)

    monkeypatch.setattr(Path, "rename", asked_twice)
    files.rename(tmp_path / "a", tmp_path / "b")
    assert [path.name for path in tmp_path.iterdir()] == ["b"]
    with pytest.raises(FileNotFoundError):
        files.rename(tmp_path / "a", tmp_path / "c")


def consolidate(folder: Path) -> tuple[int, bool]:
    """Saves 120 MB as two ranks and writes them into one file; bytes of memory for that, and whether no bit changed."""
    count, tensors = 1_000_000, range(30)  # of 4 bytes each

    def tensor(i: int) -> Tensor:
        return torch.arange(count + i, dtype=torch.int32).mul_(2654435 + i).view(torch.float32)

    def i_of(key: str) -> int:
        return int(key[1:].partition(":")[0])

    paths = [folder / f"rank-{rank}" for rank in range(2)]
    whole = {}
    for rank, path in enumerate(paths):
        layout = {f"w{i}:{(count + i) // 2 * rank}": (torch.float32, [(count + i + rank) // 2]) for i in tensors}
        half = lambda key: tensor(i_of(key)).tensor_split([(count + i_of(key)) // 2])[rank]  # noqa: B023, E731
        tensor_files.write_file(path, layout, half)
        whole |= {f"w{i}": {"dtype": "F32", "shape": [count + i]} for i in tensors}
    stored = TensorFiles(paths, whole)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    out = folder / "new" / "one.safetensors"
    export.write(out, stored, {f"t.{name}": name for name in whole}, {"format": "pt"})
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
    with safe_open(out, "pt") as file:
        assert file.metadata() == {"format": "pt"}
        return 1024 * peak, all(bits(file.get_tensor(f"t.w{i}")) == bits(tensor(i)) for i in tensors)


def test_consolidation_changes_no_bit_and_holds_one_tensor_at_a_time(tmp_path: Path) -> None:
    (result,) = run_ranks(1, consolidate, tmp_path)
    grown, is_same = result.value
    assert is_same
    # Two tensors of 4 MB at a time, for which the allocator may keep as much as some more; all are 120 MB.
    assert grown < 40_000_000
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["one.safetensors"]
