"""The folder that a weight-changing method writes: whole or not at all."""

import shutil

import pytest

from saeguard.baselines.checkpoint import RECORD_FILE, new_folder
from saeguard.errors import BaselineError


def test_a_folder_that_cannot_be_replaced_stays(tmp_path):
    out = tmp_path / "out"
    for content in ("old", "new"):
        with new_folder(out) as new:
            (new / RECORD_FILE).write_text(content, "utf-8")
    with pytest.raises(BaselineError, match="cannot write"), new_folder(out) as new:
        shutil.rmtree(new)
    assert (out / RECORD_FILE).read_text("utf-8") == "new"
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
