"""benchmarks/sharded.py with tiny models on virtual devices: its rows, and what it leaves out."""

from __future__ import annotations

import dataclasses
import json

import jax
import pytest

from jaxdecode import bench, roofline
from jaxdecode.decode_loop import SplitModel
from jaxdecode.device_model import DEVICES
from jaxdecode.memory import Workload
from jaxdecode.models import sharding
from jaxdecode.models.config import PRESETS
from jaxdecode.models.random_model import random_model
from jaxdecode.models.sharding import fit
from jaxdecode.pallas_kernels import AttentionChoice
from jaxdecode.read_bandwidth import ReadCeiling

H200 = DEVICES["h200"]
OURS = "flash_decode"
TINY = ("--tiny", "--tokens", "2", "--repetitions", "1", "--read-methods", "copy")
CEILING = ReadCeiling(1e12, "copy", {"copy": 1e12}, 1)


@pytest.fixture
def script(script, monkeypatch):
    # The script gives it a value, for its own process.
    monkeypatch.setenv("XLA_PYTHON_CLIENT_MEM_FRACTION", "0.5")
    return script


@pytest.fixture
def sharded(script):
    return script("sharded")


def run(sharded, tmp_path, *arguments) -> tuple[int, dict[str, dict]]:
    """The exit status, and the results by part."""
    status = sharded.main([*arguments, *TINY, "--output", str(tmp_path)])
    files = {path.name: json.loads(path.read_text()) for path in tmp_path.glob("*.json")}
    assert all(name == f"sharded_{results['part']}.json" for name, results in files.items())
    return status, {results["part"]: results for results in files.values()}


def planned(sharded, *arguments, devices=8, device=H200):
    """A run that is not made: of so many H200s."""
    made = sharded.Run(sharded.parse(arguments), None, jax.devices()[:devices], CEILING)
    made.device = device
    return made


def reasons(results) -> dict[str, str]:
    return {line["case"]: line["reason"] for line in results["left_out"]}


# Models
def test_parts_share_models_and_rows(sharded, tmp_path, script, monkeypatch, capsys):
    monkeypatch.setattr(sharded, "of_device", lambda device: H200)
    timed = []
    decode = bench.Bench.decode

    def spy(self, lengths, *arguments, **options):
        timed.append((self.model.sharding.num_devices, lengths))
        return decode(self, lengths, *arguments, **options)

    monkeypatch.setattr(bench.Bench, "decode", spy)
    status, files = run(sharded, tmp_path, "depth", "scaling", "--devices", "2")
    assert status == 0
    # The mesh that both parts have comes once, and its cases are measured once.
    said = capsys.readouterr().err
    assert [said.count(f"34b, {mesh}: random") for mesh in ("tensor=2", "one device")] == [1, 1]
    assert sorted(devices for devices, lengths in timed if lengths == [64]) == [1, 2]
    depth, scaling = files["depth"], files["scaling"]
    for results in (depth, scaling):
        for key in ("device", "jax", "source", "date", "read_peak_tb_s"):
            assert results[key]
        assert results["source"] == script("source_hash").source_hash()
    by_depth = {row["depth"]: row for row in depth["rows"]}
    assert list(by_depth) == [1, 64, 8, 128]
    rows = {(row["devices"], row["depth"]): row for row in scaling["rows"]}
    assert list(rows) == [(2, 1), (2, 8), (2, 64), (1, 1), (1, 8), (1, 64)]
    assert rows[2, 64] == by_depth[64]
    assert {n: rows[n, 8]["mesh"] for n in (1, 2)} == {1: "", 2: "tensor=2"}
    # What this machine lacks is named: two kinds of devices, and the kernels.
    assert {reason for case, reason in reasons(scaling).items() if "tensor=4" in case} == {
        "it needs 4 devices, and there are 2"
    }
    assert len(reasons(scaling)) == 6
    assert all("need an NVIDIA Hopper GPU" in reason for reason in reasons(depth).values())
    check_row(script, rows[2, 8], scaling["read_peak_tb_s"])


def test_one_model_serves_both_kinds_of_collectives(sharded, tmp_path, monkeypatch):
    """On a machine that is taken for one where the peers' memory is within reach."""
    monkeypatch.setattr(sharded, "choose_collectives", lambda mesh: ("peer", ""))
    monkeypatch.setattr(sharding, "choose_collectives", lambda mesh: ("peer", ""))
    monkeypatch.setattr(sharded.bench, "choose_attention", choose_ours)
    made, timed = [], []

    def make(*arguments, **options):
        made.append(random_model(*arguments, **options))
        return made[-1]

    def decode(self, lengths, implementation, **options):
        timed.append(self.model)
        return bench.Row(
            "", "", "", "", 1, lengths[0], 1, implementation, 2, 1, 1.0, None, 1.0, 0.0,
            fraction_of_bound=0.5,
        )  # fmt: skip

    monkeypatch.setattr(sharded, "random_model", make)
    monkeypatch.setattr(bench.Bench, "decode", decode)
    status, files = run(sharded, tmp_path, "depth", "--devices", "2")
    assert (status, len(made)) == (0, 1)
    rows = files["depth"]["rows"]
    found = [(row["depth"], row["implementation"], row["collectives"]) for row in rows]
    assert found[:4] == [
        (1, OURS, "peer"), (1, "xla", "xla"), (1, bench.NO_SPLIT, "peer"), (1, OURS, "xla")
    ]  # fmt: skip
    assert [model.sharding.collectives for model in timed[:4]] == ["peer", "xla", "peer", "xla"]
    assert sum(each[1:] == (OURS, "xla") for each in found) == 2
    assert sum(each[1:] == (OURS, "peer") for each in found) >= 8
    # The very same arrays, and another program.
    first, other = timed[:2]
    assert where(other) == where(first) == where(made[0])
    assert SplitModel(first).static != SplitModel(other).static


def choose_ours(*arguments):
    return AttentionChoice(OURS, "")


def where(model) -> list[int]:
    """The addresses of the weights on each device."""
    return [
        shard.data.unsafe_buffer_pointer()
        for array in model.params().values()
        for shard in array.addressable_shards
    ]


def check_row(script, row, read_peak):
    """The row follows from its own numbers, and the planner's prediction stands in it."""
    assert row["bound_tok_s"] == pytest.approx(1e12 * read_peak / row["bytes_per_step"])
    assert row["fraction_of_bound"] == pytest.approx(row["tok_s"] / row["bound_tok_s"])
    assert (row["model"], row["num_layers"], row["implementation"]) == ("codellama-34b", 2, "xla")
    assert row["collectives"] == "xla"
    config = script("runs").tiny(PRESETS["codellama-34b"])
    work = Workload(config=config, context=8 + 1, dtype="bfloat16")
    speed = roofline.speed(work, fit(config, {"tensor": 2}), H200.speeds)
    assert row["predicted_tok_s"] == speed.predicted_tok_s


def test_layers_are_itemised(sharded, tmp_path, monkeypatch):
    """Kernel names as a GPU gives them, on top of a step that runs here."""

    def kernels(dispatch):
        dispatch()
        fusions = sharded.items_of_fusions(dispatch.hlo())
        own = [next(name for name, item in fusions.items() if item == "matvecs")]
        return [(name, 8e-6) for name in [*own, "ncclDevKernel_AllReduce_x(int)", "a_2", "a_3"]]

    monkeypatch.setattr(sharded, "cupti_kernels", kernels)
    status, files = run(sharded, tmp_path, "layers", "--devices", "2")
    assert status == 0
    short, long = files["layers"]["rows"]
    assert (short["depth"], long["depth"], short["mesh"]) == (1, 64, "tensor=2")
    assert short["collectives"] == long["collectives"] == "xla"
    # 8 us on 2 devices, over 2 layers and 2 tokens.
    assert short["items_us"] == pytest.approx(
        {"matvecs": 1, "attention": 0, "collectives": 1, "rest": 2}
    )
    assert short["idle_us"] == pytest.approx(short["us"] - 4)
    assert [(k["name"], k["item"], k["us"]) for k in short["kernels"][:1]] == [
        ("a", "rest", pytest.approx(2))
    ]
    assert short["kernels"][0]["per_layer"] == 0.25


def test_without_cupti_layers_say_so(sharded, tmp_path):
    status, files = run(sharded, tmp_path, "layers", "--devices", "1")
    assert (status, files["layers"]["rows"]) == (0, [])
    assert any("need CUPTI" in reason for reason in reasons(files["layers"]).values())


def test_a_budget_that_is_over_makes_no_model(sharded, tmp_path, monkeypatch):
    monkeypatch.setattr(sharded, "random_model", lambda *_, **__: pytest.fail("made a model"))
    status, files = run(sharded, tmp_path, "million", "--budget-s", "-1")
    assert (status, files["million"]["rows"]) == (0, [])
    assert set(reasons(files["million"]).values()) == {"the time was over"}


def test_a_case_that_fails_is_named_and_the_others_go_on(sharded, tmp_path, monkeypatch):
    def fail(self, lengths, *arguments, **options):
        raise RuntimeError("RESOURCE_EXHAUSTED: no room\nsecond line")

    monkeypatch.setattr(bench.Bench, "decode", fail)
    status, files = run(sharded, tmp_path, "scaling", "--devices", "1")
    assert status == 1
    assert (
        list(reasons(files["scaling"]).values())[:3]
        == ["failed: RuntimeError: RESOURCE_EXHAUSTED: no room"] * 3
    )


def test_options(sharded, capsys):
    assert sharded.parse([]).parts == list(sharded.PARTS)
    assert sharded.__doc__.count("\n    ") > len(sharded.PARTS)
    assert all(f"\n    {part} " in sharded.__doc__ for part in sharded.PARTS)
    with pytest.raises(SystemExit):
        sharded.parse(["depth", "width"])
    assert "PART must be one of depth, layers" in capsys.readouterr().err


# Planning
@pytest.mark.parametrize(
    ("devices", "memory", "layers"),
    [(2, 138e9, 48), (2, 112e9, 39), (4, 112e9, 48), (1, 112e9, 19)],
)
def test_a_million_tokens_take_as_many_layers_as_fit(sharded, devices, memory, layers):
    device = dataclasses.replace(H200, memory=int(memory))
    made = planned(sharded, "million", devices=devices, device=device)
    _, case = made.jobs()[0]
    config = case.setup.config
    assert (case.depth, config.num_layers, config.num_kv_heads) == (1_000_000, layers, 8)
    assert made.obstacle(case) is None
    if layers == 48:
        assert case.setup.model == "codellama-34b"
    else:
        assert case.setup.model == f"codellama-34b, {layers} of 48 layers"
        more = dataclasses.replace(config, num_layers=layers + 1)
        setup = dataclasses.replace(case.setup, config=more)
        more_layers = dataclasses.replace(case, setup=setup)
        assert "does not fit into memory: weights" in made.obstacle(more_layers)


def test_models_that_do_not_fit_are_left_out(sharded):
    small = dataclasses.replace(H200, memory=40 * 10**9)
    made = planned(sharded, "scaling", devices=4, device=small)
    found = {case.devices: made.obstacle(case) for _, case in made.jobs()}
    assert found[4] is None
    assert "it would fit on" in found[1]
    assert found[8] == "it needs 8 devices, and there are 4"


def test_a_mesh_that_does_not_divide_the_model_is_left_out(sharded):
    made = planned(sharded, "depth", devices=3)
    assert all("tensor=3 does not divide" in made.obstacle(case) for _, case in made.jobs())
    made = planned(sharded, "depth", "--tensor", "2", devices=3)
    assert {case.setup.mesh for _, case in made.jobs()} == {"tensor=2"}
    assert made.obstacle(made.jobs()[0][1]) is None


def test_models_come_one_after_the_other(sharded):
    jobs = planned(sharded).jobs()
    setups = [case.setup for _, case in jobs]
    changes = [b for a, b in zip([object(), *setups], setups, strict=False) if a != b]
    assert len(changes) == len(set(setups))
    assert {part for part, _ in jobs} == set(sharded.PARTS)
    # The profiler slows down what is measured after it.
    profiled = [sharded.PARTS[part].profiled for part, _ in jobs]
    assert profiled == sorted(profiled)
    assert any(profiled)


# Cases
@pytest.mark.parametrize(
    ("devices", "peers"), [(1, False), (2, True), (2, False), (4, True), (8, False), (16, False)]
)
def test_every_part_has_each_case_once(script, devices, peers):
    cases = script("sharded_cases")
    setup = cases.spread(devices)
    assert setup.devices == devices
    parts = {
        "depth": cases.depth_cases(setup, OURS, peers),
        "layers": cases.layer_cases(setup, OURS, peers),
        "million": cases.million_cases(setup, devices, OURS),
        "scaling": cases.scaling_cases(devices, OURS),
        "attention": cases.attention_cases(devices),
        "collectives": cases.collective_cases(devices, script("sharded_ops").implementations()),
    }
    for found in parts.values():
        assert len(set(found)) == len(found) == len(set(map(str, found)))
    assert {case.depth for case in parts["depth"]} == {2**i for i in range(9, 18)}
    assert {1, 2, 4, 8, devices} == {case.devices for case in parts["scaling"]}
    # The programs of a model: rooms of ours and of unsplit attention, and the depths of XLA's.
    programs = {(c.implementation, c.collectives, c.room or c.depth) for c in parts["depth"]}
    assert len(programs) == 2 + 1 + 4 + 2 * peers
    # What needs no program that the first part has not compiled.
    assert {(c.implementation, c.collectives, c.room or c.depth) for c in parts["layers"]} <= (
        programs
    )
    without = {
        part: [c.depth for c in found if (c.implementation, c.collectives) == (OURS, "xla")]
        for part, found in parts.items()
        if part in ("depth", "layers", "million", "scaling")
    }
    assert without == {
        "depth": [512, 65536] * peers, "layers": [512] * peers, "million": [], "scaling": [],
    }  # fmt: skip
    plain = [c for c in parts["depth"] + parts["layers"] if c.implementation == "xla"]
    assert {c.collectives for c in plain} == {"xla"}
    smallest = min(case.devices for case in parts["collectives"])
    assert smallest == 2


def test_the_collectives_have_the_sizes_of_the_model(script):
    cases = script("sharded_cases")
    names = {
        "all_reduce": ("psum", "peer"), "all_gather": ("a",), "all_to_all": ("b",),
        "merge_columns": ("c", "peer"),
    }  # fmt: skip
    found = cases.collective_cases(4, names)
    sizes = {case.bytes for case in found if case.collective == "all_reduce"}
    assert (min(sizes), max(sizes)) == (2048, 8 * 2**20)
    assert [case.implementation for case in found[:2]] == ["psum", "peer"]
    # As the planner counts what the model sends in each layer.
    config = dataclasses.replace(PRESETS["codellama-34b"], num_kv_heads=1)
    work = Workload(config=config, context=1, dtype="bfloat16")
    sent = roofline.collectives(work, fit(config, {"seq": 4}))
    all_reduce, heads, partials = (each.bytes for each in sent[:3])
    size = {case.collective: case.bytes for case in found if case.collective != "all_reduce"}
    assert found[0].bytes * 2 * 3 / 4 == all_reduce
    assert size["all_gather"] * 3 == heads
    assert size["all_to_all"] * 3 / 4 == partials
    merge = script("sharded_ops").COLLECTIVES["merge_columns"]
    assert size["merge_columns"] * merge.sent(4) == partials
