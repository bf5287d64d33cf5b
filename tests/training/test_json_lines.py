"""Files of one JSON object per line: what is damaged costs its line and no other."""

from __future__ import annotations

from pathlib import Path

import pytest

from dgt.training import guard, json_lines, sample_log


@pytest.mark.parametrize(
    "odd", [b"\xff\xfe", b"[1]", b"1", b'{"step": "x"}', b'{"val/top1": 1}', b'{"step": 7, "ep', b""]
)
def test_lines_that_are_no_whole_objects_are_passed_over(tmp_path: Path, odd: bytes) -> None:
    path, good = tmp_path / "rows", {"step": 1, "epoch": 0, "consumed": 8, "ids": [3], "used": True}
    for number in (1, 2):
        json_lines.append(path, good | {"step": number})
        with path.open("ab") as file:
            file.write(odd + b"\n")
    assert [row["step"] for row in json_lines.read(path, "step")] == [1, 2]
    assert [row["step"] for row in guard.read(path)] == [1, 2]
    assert [row["step"] for row in sample_log.rows(path)] == [1, 2]


def test_a_cut_line_does_not_take_the_next_one_with_it(tmp_path: Path) -> None:
    path = tmp_path / "rows"
    path.write_bytes(b'{"step": 1}\n{"st')
    for number in (2, 3):
        json_lines.append(path, {"step": number})
    assert path.read_text() == '{"step": 1}\n{"st\n{"step": 2}\n{"step": 3}\n'
