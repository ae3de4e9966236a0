"""Whole runs over shards that are not files of this machine."""

from pathlib import Path

import pytest

from cosmos_scale.data.scenes.scene_shards import SceneShards
from cosmos_scale.testing.runs import records, train_to_end, write_run
from cosmos_scale.testing.shard_files import write_shards
from tests.data.web_server import web_server

STEPS = 4


@pytest.mark.slow
def test_runs_over_a_faulty_web_server_and_over_commands_are_those_over_files(tmp_path: Path) -> None:
    """To the last bit: the same samples come in the same order, and no secret of the URL is left anywhere."""
    source = write_shards(tmp_path / "shards", [12, 9, 11])
    remote = {"backoff_s": 0.01, "cache": str(tmp_path / "cache")}
    run = write_run(tmp_path, SceneShards(source, source), data={"workers": 1, "remote": remote})
    steps = f"train.max_steps={STEPS}"
    train_to_end(run, steps, "name=files", ranks=2).require(0)
    expected = [record["loss"] for record in records(run, "files")]
    assert len(expected) == STEPS
    with web_server(source, tmp_path / "log", fail_every=10, fault="drop") as server:
        places = {
            "web": f"{server.url}/{{00000..00002}}.tar?token=secret",
            "command": f"pipe:cat {source}/{{00000..00002}}.tar",
        }
        for name, place in places.items():
            source_keys = (f"data.sources.0.shards={place!r}", f"data.sources.0.index={source}")
            finished = train_to_end(run, steps, f"name={name}", *source_keys, ranks=2).require(0)
            assert [record["loss"] for record in records(run, name)] == expected
            assert "secret" not in finished.output + finished.errors
            assert not [
                path for path in (run.parent / name).rglob("*") if path.is_file() and b"secret" in path.read_bytes()
            ]
        assert len(server.requests()) >= 2 * STEPS * 4 * 10 // 9  # a range for each sample, and those that failed
    assert len(list((tmp_path / "cache").glob("*.shard"))) == 3
