"""How the benchmark suite measures: turns, waves that are kept, workers, the command line."""

import json

import pytest

from benchmarks.bench import __main__ as bench
from benchmarks.bench import device, store
from benchmarks.bench.engines import STOCK, EngineSpec, chunked, engine_arguments, take_turns
from benchmarks.bench.parts import PARTS
from benchmarks.bench.parts import prefill as prefill_part
from benchmarks.bench.progress import Progress
from benchmarks.bench.settings import FULL, QUICK, BenchModel, Settings
from benchmarks.bench.store import Store
from benchmarks.bench.worker import Worker
from benchmarks.local_model import make_config
from benchmarks.quality.model_shape import ModelShape
from vllm_reroute.schedule import RerouteOptions

from .worker_calls import complain, remember, vanish

RUN = {"date": "2030-01-01 00:00 UTC", "commit": "abc"}
WIDE = BenchModel(
    folder="wide",
    shape=ModelShape(visual_tokens=576, decoder_layers=32, image_token=4, kv_bytes=32 * 8192),
    kv_bytes=8192,
    max_positions=4096,
)


@pytest.fixture
def progress():
    bar = Progress(1)
    yield bar
    bar.close()


def test_everyone_has_a_turn_in_every_round_and_the_first_is_discarded(progress):
    asked = []

    def ask(name):
        asked.append(name)
        return {"number": len(asked)}

    samples = take_turns(["a", "b", "c"], ask, 3, progress)
    rounds = [asked[i : i + 3] for i in range(0, 12, 3)]
    assert len(asked) == 12 and all(sorted(one) == ["a", "b", "c"] for one in rounds)
    # Rounds begin with different ones.
    assert len({one[0] for one in rounds}) == 3
    counted = sorted(sample["number"] for of in samples.values() for sample in of)
    assert counted == list(range(4, 13)) and {len(of) for of in samples.values()} == {3}


def test_the_base_is_in_every_wave():
    base = [EngineSpec(name="stock"), EngineSpec(name="shallow")]
    others = [EngineSpec(name=str(i)) for i in range(6)]
    assert chunked(base, others, 8) == [[*base, *others]]
    # Remove and reroute are neighbours and stay in one wave: not 5 and 1, but 4 and 2.
    for at_once, sizes in ((7, [6, 4]), (6, [6, 4]), (5, [4, 4, 4]), (3, [3] * 6)):
        waves = chunked(base, others, at_once)
        assert [len(wave) for wave in waves] == sizes
        assert all(wave[:2] == base for wave in waves)
        assert [spec for wave in waves for spec in wave[2:]] == others
    assert [len(wave) for wave in chunked(base[:1], others, 7)] == [7]


def test_engines_of_a_wave_differ_only_in_what_is_compared(tmp_path):
    settings = Settings(sizes=FULL, folder=tmp_path)
    stock = engine_arguments(settings, WIDE, EngineSpec(name=STOCK), 832, 1)
    routed = EngineSpec(name="x", options={"schedule": "pdrop"}, compiled=True)
    routed = engine_arguments(settings, WIDE, routed, 832, 1)
    assert {key for key in stock if stock[key] != routed[key]} == {
        "additional_config",
        "enforce_eager",
    }
    assert not stock["enable_prefix_caching"] and stock["mm_processor_cache_gb"] == 0
    shallow = engine_arguments(settings, WIDE, EngineSpec(name="s", depth=2), 832, 1)
    assert shallow["hf_overrides"] == {"text_config": {"num_hidden_layers": 2}}
    assert shallow["load_format"] == "dummy" and "load_format" not in stock
    # A dense request of the longest kind fits the pool.
    assert stock["kv_cache_memory_bytes"] >= 832 * 8192 * 32


def test_pairs_of_a_tier_average_alike():
    for tier in FULL.tiers:
        specs = prefill_part._of_tier(tier, WIDE) + prefill_part._pair(
            "nuwa", WIDE, tier, tier=tier
        )
        pairs = {}
        for spec in specs:
            schedule = spec.schedule(WIDE)
            pairs.setdefault(schedule.name, {})[schedule.action] = schedule.average(576)
        assert set(pairs) == {"fastv", "pdrop", "nuwa"}
        for of in pairs.values():
            assert of["remove"] == pytest.approx(of["reroute"], abs=0.5)
            assert of["reroute"] == pytest.approx(tier, abs=1.0)


def test_every_part_has_waves_on_its_models(tmp_path, progress, monkeypatch):
    # No checkpoint is made: a config tells depth and grid.
    monkeypatch.setattr(
        "benchmarks.bench.settings.build_local_model",
        lambda path, shape: make_config(shape).save_pretrained(tmp_path) or tmp_path,
    )
    for sizes in (FULL, QUICK):
        settings = Settings(sizes=sizes, folder=tmp_path)
        waves = {name: list(part.waves(settings, progress)) for name, part in PARTS.items()}
        assert all(waves.values())
        assert {str(tier) for tier in sizes.tiers} < set(waves["prefill"])
    assert FULL.wide.text_layers >= 32 and FULL.wide.hidden_size >= 1024
    assert FULL.levels == (1, 2, 4, 8, 16, 32) and max(FULL.groups) == 12
    for name in ("fastv", "pdrop"):
        RerouteOptions(schedule=name).resolve(round(min(FULL.depths) * FULL.narrow.text_layers))


def test_a_finished_wave_is_not_measured_again(tmp_path):
    kept, calls = Store(tmp_path, {"rounds": 5, "sources": "a"}), []

    def measure():
        calls.append(1)
        return {"seconds": [1.5, 2.5], "pairs": [(1, 2)]}

    first = kept.measured("prefill.192", RUN, measure)
    again = Store(tmp_path, {"rounds": 5, "sources": "a"}).measured("prefill.192", RUN, measure)
    assert len(calls) == 1
    assert again == first == {"seconds": [1.5, 2.5], "pairs": [[1, 2]]}
    assert store.read(tmp_path / "prefill.192.json")["run"] == RUN
    kept.forget("prefill.192")
    kept.measured("prefill.192", RUN, measure)
    assert len(calls) == 2


def test_waves_of_other_settings_are_refused(tmp_path):
    Store(tmp_path, {"rounds": 5, "sources": "a"}).measured("x.y", RUN, dict)
    other = Store(tmp_path, {"rounds": 5, "sources": "b"})
    with pytest.raises(ValueError, match=r"sources was 'a', is 'b'.*--fresh"):
        other.wave("x.y")
    assert Store(tmp_path, {"rounds": 5, "sources": "a"}).wave("x.y") == {}


def test_a_wave_that_fails_leaves_nothing(tmp_path):
    kept = Store(tmp_path, {})

    def fail():
        raise RuntimeError("no")

    with pytest.raises(RuntimeError):
        kept.measured("x.y", RUN, fail)
    assert kept.wave("x.y") is None and not list(tmp_path.glob("*"))


@pytest.mark.parametrize("text", ["{", "[]", '{"measured": 1}'])
def test_files_that_are_no_waves_are_named(tmp_path, text):
    (tmp_path / "x.y.json").write_text(text)
    with pytest.raises(ValueError, match=r"x\.y\.json.*--fresh"):
        Store(tmp_path, {}).wave("x.y")


def test_what_identifies_a_run_survives_json(tmp_path):
    for sizes in (FULL, QUICK):
        identity = bench.identity_of(Settings(sizes=sizes, folder=tmp_path))
        assert json.loads(json.dumps(identity)) == identity


def test_code_that_is_measured_is_part_of_the_identity(tmp_path):
    for source in store.SOURCES:
        path = tmp_path / source
        path.parent.mkdir(parents=True, exist_ok=True)
        if not path.suffix:
            path = path / "decoder.py"
            path.parent.mkdir()
        path.write_text("a = 1\n")
    before = store.sources_digest(tmp_path)
    (tmp_path / "vllm_reroute" / "notes.md").write_text("x")
    assert store.sources_digest(tmp_path) == before
    (tmp_path / "vllm_reroute" / "decoder.py").write_text("a = 2\n")
    assert store.sources_digest(tmp_path) != before


class Part:
    """Stands in for a part of two waves, of which one fails while `broken`."""

    TITLE = "Fake"

    def __init__(self):
        self.broken, self.calls = True, []

    def waves(self, settings, progress):
        return {"one": self._one, "two": self._two}

    def _one(self):
        self.calls.append("one")
        return {"value": 1}

    def _two(self):
        self.calls.append("two")
        if self.broken:
            raise RuntimeError("engine ended.\nout of memory")
        return {"value": 2}

    def summarise(self, measured):
        return {"values": [wave["value"] for wave in measured.values()], "targets": []}

    def markdown(self, found):
        yield f"values: {found['values']}"

    def draw(self, found, folder):
        return []


def test_a_run_goes_on_where_it_stopped(tmp_path, monkeypatch, capsys):
    part = Part()
    monkeypatch.setitem(PARTS, "prefill", part)
    args = bench.parse_arguments(["--quick", "--only", "prefill", "--out", str(tmp_path)])
    found = bench.run(args)
    assert found["not_finished"] == {"prefill.two": "out of memory"}
    assert "Incomplete" in (tmp_path / "bench.md").read_text()
    part.broken = False
    found = bench.run(args)
    assert part.calls == ["one", "two", "two"] and not found["not_finished"]
    assert found["parts"]["prefill"]["values"] == [1, 2]
    assert json.loads((tmp_path / "bench.json").read_text())["parts"] == found["parts"]
    args.fresh = True
    bench.run(args)
    assert part.calls == ["one", "two", "two", "one", "two"]
    # Another number of rounds is another measurement, and is refused before anything starts.
    args.fresh, args.rounds = False, 3
    with pytest.raises(ValueError, match="rounds was 2, is 3"):
        bench.run(args)
    # The report alone measures nothing and minds nothing.
    args.report = True
    assert bench.run(args)["parts"] == found["parts"] and len(part.calls) == 5
    monkeypatch.setattr(bench, "PUBLISHED", tmp_path / "published")
    args.report, args.publish = False, True
    assert bench.run(args)["parts"] == found["parts"] and len(part.calls) == 5
    published = [path.read_text() for path in (tmp_path / "published").iterdir()]
    assert len(published) == 2 and not any(str(tmp_path) in text for text in published)


def test_threads_of_waiting_engines_do_not_spin(monkeypatch):
    monkeypatch.setattr(device, "ON_GPU", False)
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    on_cpu = device.environment()
    assert on_cpu["OMP_NUM_THREADS"] == str(device.threads()) and on_cpu["KMP_BLOCKTIME"] == "5"
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    assert device.environment()["OMP_NUM_THREADS"] == "1"
    monkeypatch.setattr(device, "ON_GPU", True)
    assert not any("CPU" in name or "OMP" in name for name in device.environment())


def test_a_worker_keeps_its_state_and_reports_errors(tmp_path):
    with Worker("a b", tmp_path) as worker:
        assert [worker.call(remember, 2), worker.call(remember, 3)] == [2, 5]
        with pytest.raises(RuntimeError, match="a b: ValueError: does not fit"):
            worker.call(complain)
        assert worker.call(remember, 1) == 6
        with pytest.raises(RuntimeError, match="ended without an answer"):
            worker.call(vanish)
    log = (tmp_path / "a-b.log").read_text()
    assert "said" in log and "does not fit" in log


@pytest.mark.parametrize(
    "words",
    [
        ["--rounds", "0"],
        ["--only", "nothing"],
        ["--at-once", "2"],
        ["--dtype", "int8"],
        ["--publish", "--quick"],
    ],
)
def test_arguments_that_make_no_sense_are_refused(words, capsys):
    with pytest.raises(SystemExit) as stopped:
        bench.parse_arguments(words)
    assert stopped.value.code == 2 and words[0] in capsys.readouterr().err


def test_a_trial_has_a_folder_of_its_own():
    quick, full = bench.parse_arguments(["--quick"]), bench.parse_arguments([])
    assert quick.out != full.out and quick.rounds < full.rounds == 5
    assert set(full.only) == set(PARTS)
