"""What is made of the ranks' measurements: rows that add up, findings, and the comparison with an earlier profile."""

import json
from pathlib import Path
from typing import Any

import pytest

from cosmos_scale.errors import UserError
from cosmos_scale.phases import phase
from cosmos_scale.profiling.collective_times import CollectiveTimes
from cosmos_scale.profiling.device_work import TopWork
from cosmos_scale.profiling.host_waits import HostWait
from cosmos_scale.profiling.loader_times import time_loader
from cosmos_scale.profiling.machine import link_rate
from cosmos_scale.profiling.phase_rows import phase_rows, phase_sum
from cosmos_scale.profiling.profile_record import PROFILE_FILE, compared, read_record, write_record
from cosmos_scale.profiling.profile_text import profile_lines
from cosmos_scale.profiling.rank_profile import RankProfile
from cosmos_scale.profiling.spread import Spread, spread_of
from cosmos_scale.profiling.step_clock import StepTimes
from cosmos_scale.words import COLUMNS
from tests.profiling.invented import GIB, rank_profile, record_of, times


@pytest.mark.parametrize("busy", [{}, {"student": 18.0, "backward": 49.0, "teacher": 3.0}], ids=["cpu", "gpu"])
def test_phases_add_up_to_the_step(busy: dict[str, float]) -> None:
    steps = [[times(), times(student=30.0)], [times(data=9.0), times()]]
    rows = phase_rows(steps, [busy, busy], None)
    means = (times().device_ms + 5.0, times().device_ms + 3.5)
    # Medians of two are means of two, so that they add up exactly.
    assert sum(row.device.median for row in rows) == pytest.approx(sum(means) / 2)
    added = phase_sum(steps, [busy, busy])
    assert added.step_ms == pytest.approx(sum(means) / 2)
    rest = 0.0 if busy else 0.5
    assert added.difference == pytest.approx(rest / added.step_ms, rel=0.05)


def test_the_idle_time_of_a_gpu_is_what_its_kernels_leave() -> None:
    rows = {row.name: row for row in phase_rows([[times()]], [{"student": 18.0, "backward": 60.0}], None)}
    # ranks, figures and rest are the host's; of the student 2 ms; of all of teacher, loss, update and refresh.
    assert rows["idle"].device.median == pytest.approx(0.5 + 6.0 + 0.5 + 2.0 + 10.0 + 5.0 + 4.0 + 1.0)
    assert rows["student"].device.median == 18.0
    assert rows["backward"].device.median == 50.0  # never more than there is
    assert rows["data"].device.median == 2.0  # a wait on purpose
    assert rows["backward"].reduction == Spread(8.0, 8.0, 8.0)
    assert "rest" not in rows or rows["rest"].device.median == 0.0


@pytest.mark.parametrize(("by_trace", "expected"), [(7.0, Spread(7.0, 7.0, 7.0)), (None, None)])
def test_without_marks_the_trace_says_what_the_reduction_costs(by_trace: float | None, expected: Spread | None) -> None:
    step = times()
    unmarked = {key: ms for key, ms in step.host.items() if "/" not in key}
    rows = phase_rows([[StepTimes(step.host_ms, unmarked, unmarked)]], [{}], by_trace)
    assert [row.reduction for row in rows if row.name == "backward"] == [expected]


def test_the_slowest_rank_is_named() -> None:
    record = record_of([rank_profile(), rank_profile(data=12.0)])
    assert record["slowest_rank"] == 1
    (data,) = (each for each in record["phases"] if each["name"] == "data")
    assert (data["rank_min_ms"], data["rank_max_ms"], data["rank_max"]) == (2.0, 12.0, 1)
    assert data["device_ms"]["median"] == 7.0


def test_rates_and_cost() -> None:
    record = record_of([rank_profile()])
    step_s = record["step_ms"]["median"] / 1e3
    assert record["throughput"]["samples_per_second"] == pytest.approx(64 / step_s)
    assert record["throughput"]["mfu"] == pytest.approx(3e13 / step_s / 1e15)
    assert record["throughput"]["hfu"] == pytest.approx(4e13 / step_s / 1e15)
    assert record["cost"]["median"] == pytest.approx(0.01)
    assert record["cost"]["marks"] == pytest.approx(0.0005 / step_s)
    assert record["loader"]["cores_needed"] == pytest.approx(5.0 * 64 / 1e3 / step_s)


@pytest.mark.parametrize(
    ("ranks", "workers", "sections", "key"),
    [
        ([rank_profile(data=30.0)], 0, {}, "data.workers=1"),
        ([rank_profile()], 4, {"zero": {"stage": 1}}, "zero.gradient_dtype=bf16"),
        ([rank_profile()], 4, {"zero": {"stage": 3}}, "zero.stage=2"),
        ([rank_profile()], 4, {}, "model.compile=true"),
        ([rank_profile()], 4, {"train": {"global_batch": 64, "recompute": 2}}, "train.recompute=0"),
        ([rank_profile(update=40.0)], 4, {"zero": {"stage": 1, "offload": True}}, "zero.offload=false"),
        ([rank_profile()], 4, {"train": {"global_batch": 64, "micro_batches": 2}}, "train.micro_batches=1"),
    ],
    ids=["loader", "reduction", "weights", "idle", "recompute", "offload", "micro-batches"],
)
def test_findings_name_the_key_to_change(
    monkeypatch: pytest.MonkeyPatch, ranks: list[RankProfile], workers: int, sections: dict[str, Any], key: str
) -> None:
    monkeypatch.setattr("cosmos_scale.profiling.profile_record.usable_cores", lambda: 12)
    found = record_of(ranks, workers, **sections)["findings"]
    (mine,) = (finding for finding in found if finding["key"] == key)
    assert mine["gain_ms"] > 0.0
    assert 0.0 < mine["gain_share"] < 1.0
    gains = [finding["gain_ms"] or 0.0 for finding in found]
    assert gains == sorted(gains, reverse=True)


@pytest.mark.parametrize(
    ("threads", "workers", "key", "said"),
    [
        (6, 0, None, "the ranks compute on all cores"),
        (4, 0, "data.workers=1", "the training process loads its batches itself"),
        (5, 1, None, "this host has 1.0 for each beside what computes"),
    ],
)
def test_ranks_on_cpus_share_the_hosts_cores(
    monkeypatch: pytest.MonkeyPatch, threads: int, workers: int, key: str | None, said: str
) -> None:
    """Two ranks of host a with 12 cores compute on 2 x threads of them; the third rank has a host of its own."""
    monkeypatch.setattr("cosmos_scale.profiling.profile_record.usable_cores", lambda: 12)
    monkeypatch.setattr("torch.get_num_threads", lambda: threads)
    rank = rank_profile(data=30.0, on_gpu=False)
    record = record_of([rank, rank, rank._replace(host="b")], workers)
    loader, step_s = record["loader"], record["step_ms"]["median"] / 1e3
    assert loader["cores_needed_on_host"] == pytest.approx(2 * 5.0 * 64 / 1e3 / step_s) == 2 * loader["cores_needed"]
    assert (loader["ranks_on_host"], loader["cores_computing"]) == (2, 2 * threads)
    texts = "\n".join(profile_lines(record))
    assert f"12 cores of this host, of which the ranks compute on {2 * threads}\n" in texts
    (mine,) = (finding for finding in record["findings"] if said in finding["text"])
    assert mine["key"] == key


def test_findings_name_ranks_and_lines() -> None:
    texts = [finding["text"] for finding in record_of([rank_profile(), rank_profile(data=12.0)])["findings"]]
    assert any(text.startswith("rank 1 on host a takes 12.0 ms for: wait for data") for text in texts)
    assert any("cosmos_scale/engine/optimizer.py:77" in text for text in texts)
    assert any(text.startswith("ranks wait 5.0 ms for each other") for text in texts)
    assert any(text.startswith("update: 200 small collectives (all_gather, 10.0 kB each)") for text in texts)


def test_a_traced_wait_gains_no_more_than_its_phases_take() -> None:
    # Traced steps are slower: 5 ms of waiting in the loss, which takes 3 ms of a step; 9 ms in an update of 4 ms.
    found = record_of([rank_profile(ranks=0.5, loss=3.0, on_gpu=False)] * 2)["findings"]
    gains = {finding["text"].split(": ")[0]: finding["gain_ms"] for finding in found}
    assert gains["ranks wait 3.5 ms for each other before and in the loss, in messages of a few kB"] == 3.5
    assert gains["update"] == 4.0


def test_memory_planned_and_measured_stand_side_by_side() -> None:
    text = " ".join("\n".join(profile_lines(record_of([rank_profile()]))).split())
    assert "peak 30.00 GiB at 40.0 ms, in teacher" in text
    assert "what the step finds: 10.00 GiB; planned for the states: 9.00 GiB" in text
    assert "reserved 32.00 GiB, retries 0" in text
    assert "held there, by who took it: student 20.00 GiB before the step 10.00 GiB" in text


def test_collectives_are_compared_with_the_link() -> None:
    record = record_of([rank_profile(), rank_profile()])
    assert record["link_gbs"] == 450.0
    (line,) = (line for line in profile_lines(record) if "backward, reduce_scatter" in line)
    assert line.split()[-3:] == ["70.00", "15.6%", "7.00"]
    on_two_hosts = record_of([rank_profile(), rank_profile()._replace(host="b")])
    on_cpus = record_of([rank_profile(on_gpu=False)])
    for other in (on_two_hosts, on_cpus):
        assert other["link_gbs"] is None
        assert "of link" not in "\n".join(profile_lines(other))


@pytest.mark.parametrize(
    ("name", "rate"),
    [
        ("NVIDIA A100-SXM4-80GB", 300.0),
        ("NVIDIA A100 80GB PCIe", None),
        ("NVIDIA H100 NVL", None),
        ("NVIDIA H200", 450.0),
        ("NVIDIA B200", 900.0),
        ("avx512", None),
    ],
)
def test_links_are_known_by_the_name_of_a_gpu(name: str, rate: float | None) -> None:
    assert link_rate(name) == rate


def test_collectives_and_peak_stand_beside_the_plan() -> None:
    record = record_of([rank_profile()])
    assert record["planned"] is None
    row = {"phase": "backward", "kind": "reduce_scatter", "calls": 9, "mbytes": 67.7}
    record["planned"] = {"peak_bytes": 32 * GIB, "collectives": [row]}
    text = "\n".join(profile_lines(record))
    rows = text.splitlines()
    assert "peak 30.00 GiB (planned 32.00 GiB; measured -6.2 %)" in text
    for name, counts in (("backward, reduce_scatter", ["9", "67.7"]), ("update, all_gather", ["-", "-"])):
        (place,) = (number for number, row in enumerate(rows) if row.startswith(f"  {name} "))
        assert rows[place + 1].split() == ["planned", *counts]


def test_a_comparison_tells_changes_from_noise(tmp_path: Path) -> None:
    before, now = record_of([rank_profile()]), record_of([rank_profile(loss=2.0)], zero={"stage": 2})
    write_record(before, tmp_path)
    now["compared"] = compared(read_record(tmp_path / PROFILE_FILE), now, tmp_path / PROFILE_FILE)
    loss, student = (now["compared"]["phases"][name] for name in ("loss", "student"))
    assert (loss["change"], loss["clear"]) == (pytest.approx(-0.6), True)
    assert (student["change"], student["clear"]) == (0.0, False)
    assert now["compared"]["keys"] == {"zero.stage": [1, 2]}
    text = "\n".join(profile_lines(now))
    said = " ".join(text.split())
    assert "-60 % !" in text
    assert "other keys     zero.stage 1 -> 2" in text
    assert f"before: {tmp_path / PROFILE_FILE}, 1 rank, NVIDIA H100 80GB HBM3 (" in said
    json.dumps(now)  # what is written has no types of ours


def test_a_comparison_names_keys_that_one_of_both_has() -> None:
    sources = [{"name": name, "shards": name} for name in ("a", "b")]
    before, now = (record_of([rank_profile()], data={"sources": sources[:number]}) for number in (2, 1))
    for old, new, pair in ((before, now, ["b", None]), (now, before, [None, "b"])):
        assert compared(old, new, Path("before.json"))["keys"]["data.sources.1.name"] == pair


@pytest.mark.parametrize(
    "content",
    [
        "{",
        "[]",
        '{"kind": "profile", "format": 0}',
        '{"kind": "profile", "format": 1}',
        '{"kind": "profile", "format": 1, "phases": [1]}',
    ],
)
def test_other_files_are_refused(tmp_path: Path, content: str) -> None:
    file = tmp_path / "before.json"
    file.write_text(content)
    with pytest.raises(UserError, match=r"before\.json: .*; rule: "):
        read_record(file)


def test_the_loader_is_timed_by_part() -> None:
    def make_batch(number: int) -> None:
        for _ in range(4):
            with phase("decode"):
                sum(range(20_000))

    found = time_loader(make_batch, 4)
    assert set(found.parts) == {"decode", "rest"}
    assert found.ms_per_sample == pytest.approx(sum(found.parts.values()))
    assert found.cores_needed(1000, 1000.0) == pytest.approx(found.ms_per_sample)


def test_quartiles_are_clear_of_each_other() -> None:
    spread = spread_of([1.0, 2.0, 3.0, 4.0, 5.0])
    assert spread == Spread(3.0, 2.0, 4.0)
    assert spread.clear_of(Spread(5.0, 4.5, 6.0))
    assert not spread.clear_of(Spread(5.0, 4.0, 6.0))


@pytest.mark.parametrize("on_gpu", [False, True])
def test_a_profile_stands_whole_in_80_columns(tmp_path: Path, *, on_gpu: bool) -> None:
    """Many ranks, a comparison, a plan, long names and slow steps: no line is wider than a terminal."""
    names = dict.fromkeys(("student", "backward", "refresh", "data"), 12_345.6)
    ranks = [rank_profile(on_gpu=on_gpu, **names)] * 3
    kernel = TopWork(
        "aten::_scaled_dot_product_flash_attention_for_cpu_backward", "backward", ms=9999.25, calls=165.0, share=0.344
    )
    template = kernel._replace(name="gemm<" * 100)
    collective = CollectiveTimes("backward", "reduce_scatter", 165.0, 1234.5, 9999.25, 449.99, 9999.25)
    wait = HostWait("cosmos_scale/engine/gradients.py:238", "cudaStreamSynchronize", "backward", 200.0, 9999.25)
    traced = ranks[0].traced._replace(top=[kernel, template], collectives=[collective], waits=[wait])
    record = record_of([rank._replace(traced=traced) for rank in ranks], zero={"stage": 3})
    write_record(record_of([rank_profile(on_gpu=on_gpu)]), tmp_path)
    record["compared"] = compared(read_record(tmp_path / PROFILE_FILE), record, Path("before.json"))
    row = {"phase": "backward", "kind": "reduce_scatter", "calls": 165, "mbytes": 1234.5}
    record["planned"] = {"peak_bytes": 32 * GIB, "collectives": [row]}
    text = "\n".join(profile_lines(record))
    assert max(map(len, text.splitlines())) <= COLUMNS, text
    for whole in (
        kernel.name,
        wait.place,
        "9999.25",
        "12345.6 .. 12345.6",
        "    planned                  165 1.23e+03",
    ):
        assert whole in text, text
