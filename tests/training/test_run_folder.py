import os
import stat
from dataclasses import replace
from pathlib import Path

import pytest

from data_pipeline.config import CacheConfig, DataConfig
from dgt.config import Config
from dgt.training.optim import OptimizerConfig
from dgt.training.parallel import EngineConfig
from dgt.training.run_folder import RunFolder, RunFolderError, claim, differences, plain


def test_the_same_configuration_may_claim_its_folder_again(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path / "run")
    claim(folder, plain(Config()))
    claim(folder, plain(Config()))
    assert folder.checkpoints.is_dir()


def test_another_configuration_is_refused_and_the_keys_are_named(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path / "run")
    claim(folder, plain(Config()))
    before = folder.config.read_text()
    with pytest.raises(RunFolderError, match=r"optimizer.lr was 0.001, now 0.5.*choose another name="):
        claim(folder, plain(replace(Config(), optimizer=OptimizerConfig(lr=0.5))))
    assert folder.config.read_text() == before


def test_where_and_how_fast_a_run_computes_may_change(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path / "run")
    claim(folder, plain(Config()))
    claim(folder, plain(replace(Config(), engine=EngineConfig(name="fsdp"))))
    assert "fsdp" in folder.config.read_text()
    claim(folder, plain(replace(Config(), data=DataConfig(stall_seconds=60.0, cache=CacheConfig(max_gb=9.0)))))
    with pytest.raises(RunFolderError, match=r"data.canonical_nodes was 1, now 2"):
        claim(folder, plain(replace(Config(), data=DataConfig(canonical_nodes=2))))


def test_checkpoints_without_a_configuration_are_not_taken_over(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path / "run")
    (folder.checkpoints / "step_00000001").mkdir(parents=True)
    with pytest.raises(RunFolderError, match=r"holds checkpoints but no config.yaml"):
        claim(folder, plain(Config()))


def test_a_path_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(RunFolderError, match=r"file/run cannot be written: Not a directory"):
        claim(RunFolder(tmp_path / "file" / "run"), plain(Config()))


def test_differences_are_dotted_and_show_both_values() -> None:
    left, right = {"a": {"b": 1, "c": 2}, "d": 3}, {"a": {"b": 1, "c": 4}, "e": 5}
    assert differences(left, right) == {"a.c": (2, 4), "d": (3, None), "e": (None, 5)}


@pytest.mark.parametrize("mode", ["700", "750"])
def test_a_new_folder_gets_the_configured_permissions_whatever_the_umask_and_an_old_one_keeps_its_own(
    tmp_path: Path, mode: str
) -> None:
    umask = os.umask(0o077)
    try:
        folder = RunFolder(tmp_path / "runs" / "run")
        claim(folder, plain(replace(Config(), output_mode=mode)))
        assert stat.S_IMODE(folder.path.stat().st_mode) == int(mode, 8)
        folder.path.chmod(0o711)
        claim(folder, plain(replace(Config(), output_mode="770")))  # may change, as it has no bearing on results
        assert stat.S_IMODE(folder.path.stat().st_mode) == 0o711
    finally:
        os.umask(umask)
