"""What the recorder keeps, in which order, and that it never stops training."""

from __future__ import annotations

import subprocess
import sys
import threading

import numpy as np
import pytest
import torch
from synthetic_traces import random_counts, record_run, simple_plan

from ultraep_compile.telemetry import Recorder, get_recorder, read_trace
from ultraep_compile.telemetry.recorder import NOT_KEPT
from ultraep_compile.telemetry.trace import layer_shapes


@pytest.fixture
def recorder(tmp_path):
    with Recorder(tmp_path / "trace.npz") as recorder:
        yield recorder


def test_one_record_is_kept_exactly(recorder):
    counts = random_counts(0, ranks=4, experts=8)
    slot_expert, shares = simple_plan(counts, slots=2)
    recorder.record("moe", counts, slot_expert, shares)
    (layer,) = recorder.trace()
    assert (layer.name, layer.ranks, layer.experts, layer.slots) == ("moe", 4, 8, 2)
    assert np.array_equal(layer.counts_nRE[0], counts)
    assert np.array_equal(layer.shares_nRP[0], shares)
    assert np.array_equal(layer.slot_expert_NRS[0], slot_expert)
    assert np.array_equal(layer.expert_load_NE[0], counts.sum(0))
    assert np.array_equal(layer.source_load_NR[0], counts.sum(1))
    assert np.array_equal(layer.quota_NP[0], shares.sum(0))
    before = sum(int(counts[r, 2 * r : 2 * r + 2].sum()) for r in range(4))
    after = sum(int(shares[r, 4 * r : 4 * r + 4].sum()) for r in range(4))
    assert layer.kept_N2[0].tolist() == [before, after]
    assert (layer.realised_NP == -1).all() and layer.rounds_N.tolist() == [-1]


def test_record_copies_so_later_writes_do_not_show(recorder):
    counts = random_counts(0, 2, 4)
    expected = counts.clone()
    recorder.record("moe", counts)
    counts.fill_(7)
    assert np.array_equal(recorder.trace().layers[0].counts_nRE[0], expected)


def test_without_a_plan_everything_goes_to_masters(recorder):
    counts = random_counts(0, 2, 4)
    recorder.record("moe", counts)
    layer = recorder.trace().layers[0]
    assert layer.slots == 0 and np.array_equal(layer.quota_NP, layer.expert_load_NE)
    assert np.array_equal(layer.before_NR, layer.after_NR)
    assert layer.kept_N2[0, 0] == layer.kept_N2[0, 1]


def test_layers_count_their_own_microbatches_and_keep_their_order(recorder):
    for name in ("b", "a", "b", "b", "a"):
        recorder.record(name, random_counts(0, 2, 4))
    trace = recorder.trace()
    assert [layer.name for layer in trace] == ["b", "a"]
    assert [layer.microbatch_N.tolist() for layer in trace] == [[0, 1, 2], [0, 1]]
    assert trace.info["seen"] == 5


def test_one_name_with_two_shapes_becomes_two_layers(recorder):
    recorder.record("moe", random_counts(0, 2, 4))
    recorder.record("moe", random_counts(0, 4, 8))
    assert [layer.name for layer in recorder.trace()] == [
        "moe (2 ranks, 4 experts, 0 slots)",
        "moe (4 ranks, 8 experts, 0 slots)",
    ]


def test_late_facts_are_added_and_times_add_up(recorder):
    counts = random_counts(0, 2, 4)
    number = recorder.record("moe", counts, seconds={"plan": 0.25}, rounds=1)
    recorder.record("moe", counts)
    recorder.add(number, realised_P=torch.tensor([1, -1, 3, 4]), seconds={"plan": 0.5, "grad_reduce": 1.0})
    recorder.add(number, realised_P=torch.tensor([-1, 2, -1, -1]), rounds=torch.tensor([3, 2]))
    recorder.add(NOT_KEPT, seconds={"plan": 9.0})
    recorder.add(12345, seconds={"plan": 9.0})
    layer = recorder.trace().layers[0]
    assert layer.realised_NP.tolist() == [[1, 2, 3, 4], [-1, -1, -1, -1]]
    assert layer.realised_NR.tolist() == [[3, 7], [-1, -1]]
    assert layer.seconds["plan"][0] == 0.75 and np.isnan(layer.seconds["plan"][1])
    assert layer.seconds["grad_reduce"][0] == 1.0
    assert layer.rounds_N.tolist() == [3, -1]


def test_facts_of_layers_and_run(recorder):
    recorder.describe("moe", top_k=2, expert_bytes=1 << 40)
    recorder.annotate(title="a run")
    recorder.record("moe", random_counts(0, 2, 4))
    trace = recorder.trace()
    assert trace.layers[0].facts == {"top_k": 2, "expert_bytes": 1 << 40} and trace.info["title"] == "a run"


def test_long_runs_are_thinned_evenly_and_stay_bounded(tmp_path):
    recorder = Recorder(tmp_path / "t.npz", max_records=20)
    counts = random_counts(0, 2, 4)
    for _ in range(100):
        recorder.record("a", counts)
        recorder.record("b", counts)
    trace = recorder.trace()
    stride = trace.info["stride"]
    assert stride == 16
    assert len(trace) <= 20
    for layer in trace:
        assert layer.microbatch_N.tolist() == list(range(0, 100, stride))
        assert layer.seen == 100
    assert trace.info["thinned"] + len(trace) == trace.info["seen"] == 200
    assert trace.info["dropped"] == 0


def test_thinning_does_not_depend_on_when_late_facts_arrive(tmp_path):
    def run(late: bool) -> list[int]:
        recorder = Recorder(tmp_path / "t.npz", max_records=10)
        for _ in range(35):
            number = recorder.record("a", random_counts(0, 2, 4))
            if late:
                recorder.add(number, seconds={"plan": 1.0})
        return recorder.trace().layers[0].microbatch_N.tolist()

    assert run(False) == run(True)


def test_bytes_bound_the_records_and_their_full_matrices(tmp_path):
    recorder = Recorder(tmp_path / "t.npz", max_bytes=400_000)
    counts = random_counts(0, 8, 64)
    for _ in range(300):
        recorder.record("a", counts)
    layer = recorder.trace().layers[0]
    info = recorder.trace().info
    detail = layer.microbatch_N[layer.detail_n]
    assert 50 < len(layer) < 300 and 10 < len(detail) < len(layer)
    assert detail.tolist() == list(range(0, 300, info["detail_stride"]))
    assert 4 * (layer.counts_nRE.size + layer.shares_nRP.size) <= 200_000


def test_more_layers_than_records_drop_the_rest(tmp_path):
    recorder = Recorder(tmp_path / "t.npz", max_records=3)
    for microbatch in range(4):
        for layer in range(5):
            recorder.record(f"layer {layer}", random_counts(microbatch, 2, 4))
    trace = recorder.trace()
    assert [layer.microbatch_N.tolist() for layer in trace] == [[0], [0], [0]]
    assert trace.info["seen"] == 20 == len(trace) + trace.info["thinned"] + trace.info["dropped"]


def test_a_full_queue_drops_and_counts(tmp_path, monkeypatch):
    from ultraep_compile.telemetry.pending import Pending

    monkeypatch.setattr(Pending, "ready", lambda self, wait=False: wait)
    recorder = Recorder(tmp_path / "t.npz", queue=4)
    numbers = [recorder.record("a", random_counts(i, 2, 4)) for i in range(10)]
    assert numbers == [0, 1, 2, 3] + [NOT_KEPT] * 6
    trace = recorder.trace()
    assert trace.layers[0].microbatch_N.tolist() == [0, 1, 2, 3]
    assert trace.info["dropped"] == 6 and trace.info["seen"] == 10


def test_zero_loads_and_many_threads(recorder):
    def work():
        for _ in range(50):
            recorder.add(recorder.record("a", torch.zeros(2, 4, dtype=torch.int32)), seconds={"plan": 1.0})

    threads = [threading.Thread(target=work) for _ in range(4)]
    [thread.start() for thread in threads]
    [thread.join() for thread in threads]
    layer = recorder.trace().layers[0]
    assert layer.microbatch_N.tolist() == list(range(200))
    assert (layer.seconds["plan"] == 1.0).all() and (layer.after_NR == 0).all()


def test_unwritable_place_gives_one_warning_and_training_goes_on(tmp_path):
    (tmp_path / "file").write_text("")
    recorder = Recorder(tmp_path / "file" / "trace.npz", flush_every=2)
    with pytest.warns(RuntimeWarning, match=r"could not be written.*Point the option"):
        for i in range(20):
            recorder.record("a", random_counts(i, 2, 4))
        recorder.flush()
    with pytest.warns() as caught:
        recorder.close()
        import warnings

        warnings.warn("sentinel", stacklevel=1)
    assert [str(w.message) for w in caught] == ["sentinel"]
    assert recorder.record("a", random_counts(0, 2, 4)) == NOT_KEPT


def test_disk_full_leaves_the_old_file(tmp_path, monkeypatch):
    path = tmp_path / "trace.npz"
    recorder = Recorder(path)
    recorder.record("a", random_counts(0, 2, 4))
    recorder.flush()
    before = path.read_bytes()

    def full(*args, **kwargs):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(np.lib.format, "write_array", full)
    recorder.record("a", random_counts(1, 2, 4))
    with pytest.warns(RuntimeWarning, match="No space left"):
        recorder.flush()
    monkeypatch.undo()
    assert path.read_bytes() == before and [p.name for p in tmp_path.iterdir()] == ["trace.npz"]
    recorder.close()
    assert len(read_trace(path)) == 2


def test_background_writes_happen_every_n_records(tmp_path):
    path = tmp_path / "trace.npz"
    recorder = Recorder(path, flush_every=3)
    for i in range(3):
        recorder.record("a", random_counts(i, 2, 4))
    recorder._join_writer()
    assert len(read_trace(path)) == 3


def test_recorders_are_shared_by_path(tmp_path):
    first = get_recorder(tmp_path / "a.npz", max_records=7)
    assert get_recorder(str(tmp_path / "a.npz")) is first
    assert get_recorder(tmp_path / "b.npz") is not first
    first.close()
    first.close()
    again = get_recorder(tmp_path / "a.npz")
    assert again is not first
    again.close()
    get_recorder(tmp_path / "b.npz").close()


def test_exit_writes_the_file(tmp_path):
    code = (
        "import torch; from ultraep_compile.telemetry import get_recorder\n"
        f"get_recorder({str(tmp_path / 't.npz')!r}).record('a', torch.ones(2, 4, dtype=torch.int32))"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
    assert len(read_trace(tmp_path / "t.npz")) == 1


def test_record_run_helper_covers_all_fields(recorder):
    trace = record_run(recorder)
    assert len(trace) == 15 and trace.ranks == 4
    for layer in trace:
        assert np.array_equal(layer.quota_NP.sum(-1), layer.expert_load_NE.sum(-1))
        assert np.array_equal(layer.traffic()[1].sum(), layer.after_NR.sum())


@pytest.mark.gpu
def test_gpu_records_equal_cpu_records_without_a_host_sync(tmp_path):
    runs = []
    for device in ("cpu", "cuda"):
        recorder = Recorder(tmp_path / f"{device}.npz")
        counts = [random_counts(i, 4, 8) for i in range(32)]
        plans = [simple_plan(c, 2) for c in counts]
        staged = [[t.to(device) for t in (c, *p)] for c, p in zip(counts, plans, strict=True)]
        if device == "cuda":
            torch.cuda.synchronize()
            torch.cuda.set_sync_debug_mode("error")
        try:
            for c, slot_expert, shares in staged:
                seconds = {}
                if device == "cuda":
                    events = [torch.cuda.Event(enable_timing=True) for _ in range(2)]
                    events[0].record()
                    realised = shares.sum(0)
                    events[1].record()
                    seconds = {"plan": tuple(events)}
                else:
                    realised = shares.sum(0)
                number = recorder.record("a", c, slot_expert, shares, seconds=seconds)
                recorder.add(number, realised_P=realised, rounds=shares.amax())
        finally:
            torch.cuda.set_sync_debug_mode("default")
        runs.append(recorder.trace().layers[0])
    cpu, gpu = runs
    for name in layer_shapes(1, 1, 0, 0, 0):
        assert np.array_equal(getattr(cpu, name), getattr(gpu, name)), name
    assert (gpu.seconds["plan"] >= 0).all() and gpu.seconds["plan"].max() < 1


@pytest.mark.gpu
def test_gpu_recording_does_not_wait_for_a_busy_stream_and_bounds_its_queue(tmp_path):
    recorder = Recorder(tmp_path / "t.npz", queue=8)
    counts = random_counts(0, 4, 8).cuda()
    recorder.record("a", counts)
    torch.cuda.synchronize()
    torch.cuda._sleep(2_000_000_000)
    done = torch.cuda.Event()
    done.record()
    for _ in range(50):
        recorder.record("a", counts)
    assert not done.query()
    trace = recorder.trace()
    assert done.query() and trace.info["dropped"] == 42 and len(trace) == 9


@pytest.mark.gpu
def test_gpu_nothing_is_recorded_while_a_cuda_graph_is_captured(tmp_path):
    recorder = Recorder(tmp_path / "t.npz")
    counts = random_counts(0, 4, 8).cuda()
    recorder.record("a", counts)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        doubled = counts * 2
        assert recorder.record("a", doubled) == NOT_KEPT
    graph.replay()
    assert len(recorder.trace()) == 1
