"""The bound against sums by hand, the prediction against measurements, collectives against HLO."""

from __future__ import annotations

import dataclasses
import json
import re

import pytest
from compiled_steps import compile_decode, make_sharding

from jaxdecode.device_model import DEVICES
from jaxdecode.memory import Workload
from jaxdecode.models.config import PRESETS, LlamaConfig
from jaxdecode.models.sharding import Sharding, fit
from jaxdecode.roofline import Collective, collectives, seconds, speed

H200 = DEVICES["h200"].speeds
CODELLAMA = PRESETS["codellama-34b"]
ONE = Sharding()


def workload(config=CODELLAMA, **sizes) -> Workload:
    return Workload(config=config, **{"context": 8192, "dtype": "bfloat16"} | sizes)


def measured_rows(project_root):
    """Steps of presets with what `jaxdecode` chooses, on one H200 and on several."""
    folder = project_root / "benchmarks" / "results" / "h200"
    sharded = (folder / f"sharded_{part}.json" for part in ("depth", "million"))
    for path in [*sorted(folder.glob("decode_*.json")), *sharded]:
        for row in json.loads(path.read_text())["rows"]:
            ours = row["implementation"] == "flash_decode" and row["test"].startswith("tg")
            if ours and row["model"] in PRESETS and isinstance(row["depth"], int):
                yield row


def test_the_prediction_is_near_what_was_measured(project_root):
    off = []
    for row in measured_rows(project_root):
        config, context = PRESETS[row["model"]], row["depth"] + row["tokens"] // 2
        sizes = {name: int(size) for name, size in re.findall(r"(\w+)=(\d+)", row["mesh"])}
        work = workload(config, context=context, batch=row["batch"], dtype=row["dtype"])
        found = speed(work, fit(config, sizes), H200)
        assert found.bytes_per_step == pytest.approx(row["bytes_per_step"], rel=0.01)
        off.append(abs(found.predicted_tok_s / row["tok_s"] - 1))
    assert len(off) > 40
    assert max(off) <= 0.08
    assert sum(off) / len(off) <= 0.03


def test_the_prediction_for_four_gpus():
    """A plain JAX decoder with NCCL, jax 0.11.2."""
    predicted = speed(workload(context=512), fit(CODELLAMA, {"tensor": 4}), H200)
    assert predicted.predicted_tok_s == pytest.approx(146.0, rel=0.05)
    assert predicted.bound_tok_s > 1.5 * 146.0


def test_the_bound_is_bytes_by_read_rate():
    found = speed(workload(), ONE, H200)
    weights = CODELLAMA.num_parameters - CODELLAMA.vocab_size * CODELLAMA.embed_dim
    assert found.bytes_per_step == 2 * weights + 8192 * CODELLAMA.kv_bytes_per_token(2)
    assert found.bound_tok_s == pytest.approx(4.6e12 / found.bytes_per_step)


def test_heads_and_length_divide_what_a_device_reads():
    whole = speed(workload(), ONE, H200).bytes_per_step
    norms = (2 * CODELLAMA.num_layers + 1) * CODELLAMA.embed_dim * 2  # on every device
    for sizes in ({"tensor": 4}, {"seq": 4}, {"tensor": 2, "seq": 2}):
        part = speed(workload(), fit(CODELLAMA, sizes), H200).bytes_per_step
        assert 4 * (part - norms) == whole - norms


def test_a_window_bounds_what_is_read():
    short = dataclasses.replace(CODELLAMA, window=4096)
    assert (
        speed(workload(short), ONE, H200).bytes_per_step
        == speed(workload(context=4096), ONE, H200).bytes_per_step
    )
    longer = dataclasses.replace(CODELLAMA, window=8192)
    assert speed(workload(longer), ONE, H200) == speed(workload(), ONE, H200)


def test_large_batches_are_bound_by_compute():
    """Two operations for each weight and token; the cache's reading grows with the batch too."""
    alone, many = (speed(workload(context=1, batch=b), ONE, H200) for b in (1, 4096))
    assert many.bytes_per_step < 2 * alone.bytes_per_step
    weights = CODELLAMA.num_parameters - CODELLAMA.vocab_size * CODELLAMA.embed_dim
    assert many.bound_tok_s == pytest.approx(989e12 / (2 * weights), rel=0.01)
    assert many.bound_tok_s < 4096 * alone.bound_tok_s / 2


def test_prefill_takes_every_weight_and_every_pair():
    """2 operations per weight and token, 4 per number of a query and token it sees."""
    tokens = 65_536
    layers = CODELLAMA.num_parameters - 2 * CODELLAMA.vocab_size * CODELLAMA.embed_dim
    pairs = tokens * (tokens + 1) // 2
    heads = CODELLAMA.num_q_heads * CODELLAMA.head_dim * CODELLAMA.num_layers
    flops = 2 * layers * tokens + 4 * heads * pairs
    found = speed(workload(context=tokens), ONE, H200).prefill_seconds
    assert found == pytest.approx(flops / 989e12, rel=1e-3)
    windowed = dataclasses.replace(CODELLAMA, window=1)
    found = speed(workload(windowed, context=tokens), ONE, H200).prefill_seconds
    assert found == pytest.approx((2 * layers + 4 * heads) * tokens / 989e12, rel=1e-3)


TINY = LlamaConfig(
    vocab_size=256, embed_dim=64, ffw_dim=128, num_layers=3, num_q_heads=8, num_kv_heads=4,
    head_dim=16,
)  # fmt: skip
MESHES = {
    "one": {},
    "tensor=4": {"tensor": 4},
    "seq=4": {"seq": 4},
    "both": {"tensor": 2, "seq": 2},
}


@pytest.mark.parametrize(("mesh", "vocab_size"), [*((mesh, 256) for mesh in MESHES), ("both", 257)])
def test_collectives_are_those_of_the_compiled_step(mesh, vocab_size):
    config = dataclasses.replace(TINY, vocab_size=vocab_size)
    work = Workload(config=config, context=512, batch=2, dtype="float32")
    sharding = make_sharding(config, MESHES[mesh])
    hlo = compile_decode(work, sharding, num_steps=1).as_text()
    kinds = "all-reduce|all-gather|all-to-all|collective-permute|reduce-scatter"
    found = re.findall(rf" (?:{kinds})(?:-start)?\(", hlo)
    assert len(found) == sum(each.count for each in collectives(work, sharding))
    assert bool(found) == (mesh != "one")


def test_a_collective_between_hosts_takes_the_slower_link():
    each = Collective(count=1, devices=8, bytes=1e6)
    inside = seconds(each, Sharding(tensor=8), H200, 8)
    assert inside == pytest.approx(16e-6 + 1e6 / 450e9)
    for sharding, collective in (
        (Sharding(tensor=16), Collective(1, 16, 1e6)),  # more than a host has
        (Sharding(tensor=6, data=2), Collective(1, 6, 1e6)),  # the second group starts in the first
    ):
        assert seconds(collective, sharding, H200, 8) == pytest.approx(35e-6 + 1e6 / 50e9)
    assert seconds(each, Sharding(tensor=8, data=4), H200, 8) == inside  # a host for each group
    assert seconds(Collective(1, 6, 1e6), Sharding(tensor=6), H200, 8) == inside


def test_more_hosts_cost_more_than_they_bring():
    config = dataclasses.replace(CODELLAMA, num_kv_heads=64)
    one, two = (speed(workload(config), fit(config, {"tensor": n}), H200) for n in (8, 16))
    assert two.bound_tok_s > 1.9 * one.bound_tok_s
    assert two.predicted_tok_s < one.predicted_tok_s
