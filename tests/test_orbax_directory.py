"""Saving a model and reading it back: on any devices, on a full disk, killed half way."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tensorstore
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from tiny_hf import TINY, assert_same_params, bits, hf_tensors, our_params

from jaxdecode.checkpoint import load, save
from jaxdecode.checkpoint.arrays import load_params
from jaxdecode.checkpoint.orbax_directory import open_orbax_directory
from jaxdecode.checkpoint.source import WeightSource
from jaxdecode.errors import CheckpointError, PathError
from jaxdecode.models.config import RopeScaling
from jaxdecode.models.llama import Llama
from jaxdecode.models.params import param_shapes


def tiny_model(config=TINY, dtype="float32"):
    params = our_params(hf_tensors(config), config)
    return Llama.from_params(config, {k: jnp.asarray(v, dtype) for k, v in params.items()})


def host(params):
    return {name: np.asarray(array) for name, array in params.items()}


class FakeTokenizer:
    def save(self, directory):
        (directory / "tokenizer.json").write_text("{}")


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    path = tmp_path_factory.mktemp("models") / "tiny"
    save(tiny_model(), path)
    return path


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_there_and_back(tmp_path, dtype):
    config = dataclasses.replace(
        TINY, dtype=dtype, window=8, tie_embeddings=True, eos_ids=(2, 3), norm_eps=1e-6,
        rope_scaling=RopeScaling(kind="linear", factor=2.0),
    )  # fmt: skip
    model = tiny_model(config, dtype)
    save(model, tmp_path / "a" / "b")
    again, tokenizer = load(tmp_path / "a" / "b")
    assert again.config == config
    assert again.dtype == dtype
    assert tokenizer is None
    assert_same_params(again.params(), host(model.params()))


def test_what_is_saved(tmp_path):
    path = tmp_path / "tiny"
    save(tiny_model(), path, FakeTokenizer())
    names = sorted(file.name for file in path.iterdir())
    assert names == ["config.json", "generation_config.json", "tokenizer.json", "weights"]
    assert json.loads((path / "config.json").read_text())["hidden_size"] == 16
    assert [file.name for file in tmp_path.iterdir()] == ["tiny"]
    # Others may read it as far as the umask lets them.
    umask = os.umask(0)
    os.umask(umask)
    assert path.stat().st_mode & 0o777 == 0o777 & ~umask


def test_dtype_of_the_weights_counts(tmp_path):
    save(tiny_model(TINY, "bfloat16"), tmp_path / "tiny")
    model, _ = load(tmp_path / "tiny")
    assert (model.config.dtype, model.dtype) == ("bfloat16", jnp.bfloat16)


def test_loading_in_another_dtype(saved):
    model, _ = load(saved, dtype="bfloat16")
    expected = {k: jnp.asarray(v, jnp.bfloat16) for k, v in our_params(hf_tensors()).items()}
    assert_same_params(model.params(), host(expected))


def test_as_a_source_of_weights(saved):
    source: WeightSource = open_orbax_directory(saved)
    assert source.config == TINY
    assert (source.quantised, source.path, source.tokenizer()) == (False, saved, None)
    assert {name: info.shape for name, info in source.tensors.items()} == param_shapes(TINY)
    assert source.tensors["embed"].num_bytes == 40 * 16 * 4
    for name, array in our_params(hf_tensors()).items():
        half = tuple(slice(0, size // 2) for size in array.shape)
        np.testing.assert_array_equal(source.read(name, half), array[half])
        np.testing.assert_array_equal(
            bits(source.read(name, (slice(None),) * array.ndim)), bits(array)
        )
    source.close()


@pytest.mark.parametrize("num_devices", [1, 2, 8])
def test_onto_other_devices_than_those_saved_from(tmp_path, num_devices):
    def sharding(count):
        return NamedSharding(Mesh(np.array(jax.devices()[:count]), ("x",)), P("x"))

    def spread(count):
        return {
            name: sharding(count if shape[0] % count == 0 else 1)
            for name, shape in param_shapes(TINY).items()
        }

    params = our_params(hf_tensors())
    shardings = spread(4)
    arrays = {name: jax.device_put(array, shardings[name]) for name, array in params.items()}
    save(Llama.from_params(TINY, arrays), tmp_path / "tiny")
    target = spread(num_devices)
    loaded = load_params(open_orbax_directory(tmp_path / "tiny"), "float32", shardings=target)
    assert_same_params(loaded, params)
    assert all(array.sharding == target[name] for name, array in loaded.items())
    assert len(loaded["embed"].sharding.device_set) == num_devices


def test_progress(saved):
    steps = []
    load(saved, on_progress=lambda *step: steps.append(step))
    total = sum(4 * int(np.prod(shape)) for shape in param_shapes(TINY).values())
    assert len(steps) == len(param_shapes(TINY))
    assert steps[-1] == ("loading", total, total)


def test_weights_beyond_float16(tmp_path):
    params = {k: jnp.asarray(v) for k, v in our_params(hf_tensors()).items()}
    params["head"] = params["head"].at[0, 0].set(1e5)
    save(Llama.from_params(TINY, params), tmp_path / "tiny")
    with pytest.raises(CheckpointError, match="weight head has values beyond 65504"):
        load(tmp_path / "tiny", dtype="float16")


def test_weights_that_no_file_can_hold(tmp_path):
    params = {k: jnp.asarray(v) for k, v in our_params(hf_tensors()).items()}
    params["head"] = params["head"].astype(jnp.bfloat16)
    with pytest.raises(CheckpointError, match="weights are bfloat16, float32; they must all be"):
        save(Llama.from_params(TINY, params), tmp_path / "tiny")
    with pytest.raises(CheckpointError, match="weights are int8"):
        save(tiny_model(TINY, "int8"), tmp_path / "tiny")
    assert list(tmp_path.iterdir()) == []


BIG = dataclasses.replace(TINY, vocab_size=2000, embed_dim=512, ffw_dim=2048)
CHILD = """
import gc, signal, sys
import jax.numpy as jnp
import numpy as np
from pathlib import Path
from jaxdecode.checkpoint import export_safetensors, save
from jaxdecode.errors import CheckpointError
from jaxdecode.models.config import LlamaConfig
from jaxdecode.models.llama import Llama
from jaxdecode.models.params import param_shapes

# Whoever was started in the background of a shell inherits that Ctrl-C is ignored.
signal.signal(signal.SIGINT, signal.default_int_handler)
what, path, limit = sys.argv[1], Path(sys.argv[2]), int(sys.argv[3])
config = LlamaConfig(
    vocab_size=2000, embed_dim=512, ffw_dim=2048, num_layers=2, num_q_heads=4, num_kv_heads=2,
    head_dim=6, max_positions=128, dtype="float32", bos_id=1, eos_ids=(2,),
)
params = {
    name: jnp.asarray(np.full(shape, i + 1, np.float32))
    for i, (name, shape) in enumerate(param_shapes(config).items())
}
write = save if what == "save" else export_safetensors
model = Llama.from_params(config, params)
if limit:
    import resource
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
gc.disable()  # jax has a hook there, in which a Ctrl-C gets lost
try:
    print("ready", flush=True)  # from here on a Ctrl-C may come, even before this returns
    sys.stdin.readline()
    write(model, path)
    print("done", flush=True)
    sys.stdin.readline()
except KeyboardInterrupt:
    print("interrupted", flush=True)
except CheckpointError as error:
    print("refused:", error, flush=True)
"""


@contextlib.contextmanager
def child_process(root, what, path, limit=0):
    """A process that says "ready" and saves when it is told to."""
    command = [sys.executable, "-c", CHILD, what, str(path), str(limit)]
    environment = os.environ | {"JAX_PLATFORMS": "cpu"}
    pipes = dict.fromkeys(("stdin", "stdout", "stderr"), subprocess.PIPE)
    with subprocess.Popen(command, cwd=root, env=environment, text=True, **pipes) as child:
        try:
            yield child
        finally:
            child.kill()


@pytest.mark.parametrize("what", ["save", "export"])
def test_full_disk(tmp_path, project_root, what):
    with child_process(project_root, what, tmp_path / "big", limit=2 << 20) as child:
        out, err = child.communicate("go\n", timeout=100)
    assert child.returncode == 0, err
    assert "big could not be written: File too large; free space" in out
    assert "Traceback" not in err
    assert list(tmp_path.iterdir()) == []


def tell_to_save(child):
    assert child.stdout.readline() == "ready\n", child.stderr.read()
    child.stdin.write("go\n")
    child.stdin.flush()


@pytest.mark.parametrize("what", ["save", "export"])
def test_killed_while_saving(tmp_path, project_root, what):
    path = tmp_path / "big"
    expected = {
        name: np.full(shape, i + 1, np.float32)
        for i, (name, shape) in enumerate(param_shapes(BIG).items())
    }
    interrupted = 0
    with contextlib.ExitStack() as stack:
        # They start together, which saves time, and are killed one after another.
        children = [stack.enter_context(child_process(project_root, what, path)) for _ in range(3)]
        for child, longest in zip(children, (0.0, 0.3, 0.6), strict=True):
            tell_to_save(child)
            time.sleep(random.uniform(0, longest))
            child.kill()
            child.wait()
            if path.exists():
                assert_same_params(host(load(path)[0].params()), expected)
                shutil.rmtree(path)
            else:
                interrupted += 1
    assert interrupted


def test_interrupted_while_saving(tmp_path, project_root):
    with contextlib.ExitStack() as stack:
        delays = (0.0, 0.02, 0.2)  # a busy machine sleeps longer than it is told to
        paths = [tmp_path / str(i) for i in range(len(delays))]
        children = [
            stack.enter_context(child_process(project_root, "save", path)) for path in paths
        ]
        for child, path, delay in zip(children, paths, delays, strict=True):
            tell_to_save(child)
            time.sleep(delay)
            child.send_signal(signal.SIGINT)
            out, err = child.communicate(timeout=100)
            assert (child.returncode, err) == (0, "")
            assert out.endswith("interrupted\n")
            if path.exists():
                load(path)
            else:
                assert "done" not in out
        assert not [path.name for path in tmp_path.iterdir() if path.name.startswith(".")]
        assert not all(path.exists() for path in paths)


@pytest.mark.parametrize("name", ["a b", "v[1]", "x*y?", "größe", "-n", "a" * 200])
def test_any_name(tmp_path, name):
    save(tiny_model(), tmp_path / name)
    assert_same_params(host(load(tmp_path / name)[0].params()), our_params(hf_tensors()))
    assert [file.name for file in tmp_path.iterdir()] == [name]


def test_place_that_orbax_takes_for_a_pattern(tmp_path):
    for name in ("v[1]", "x*", "y?"):
        with pytest.raises(CheckpointError, match="Orbax cannot write below a directory with"):
            save(tiny_model(), tmp_path / name / "tiny")
    assert list(tmp_path.iterdir()) == []


def test_nothing_is_overwritten(saved):
    before = sorted(file.stat().st_mtime_ns for file in saved.rglob("*"))
    with pytest.raises(CheckpointError, match="tiny exists already"):
        save(tiny_model(), saved)
    assert before == sorted(file.stat().st_mtime_ns for file in saved.rglob("*"))


def damage(saved, tmp_path):
    return shutil.copytree(saved, tmp_path / "damaged")


def assert_refused(path, words, error=CheckpointError):
    with pytest.raises(error, match=words) as caught:
        load(path)
    message = str(caught.value)
    assert str(path) in message
    assert message.isprintable()
    assert len(message) < 600


def test_links_in_a_saved_model(saved, tmp_path):
    path = damage(saved, tmp_path)
    outside = tmp_path / "outside"
    outside.mkdir()
    (path / "weights" / "more").symlink_to(outside)
    assert_refused(path, "more is a link or a device", PathError)
    shutil.move(path / "weights", tmp_path / "weights")
    (path / "weights").symlink_to(tmp_path / "weights")
    assert_refused(path, "weights is a link or a device", PathError)


@pytest.mark.parametrize("name", ["_METADATA", "manifest.ocdbt", "_sharding"])
@pytest.mark.parametrize("how", ["missing", "cut", "noise"])
def test_damaged_metadata(saved, tmp_path, name, how):
    path = damage(saved, tmp_path)
    file = path / "weights" / name
    if how == "missing":
        file.unlink()
    else:
        data = file.read_bytes()
        file.write_bytes(data[: len(data) // 2] if how == "cut" else bytes(range(256)))
    if name == "manifest.ocdbt":
        assert_refused(path, "the weights are damaged|tensors do not fit")
    else:
        # Orbax's notes on its own work are not needed.
        assert_same_params(host(load(path)[0].params()), our_params(hf_tensors()))


def test_damaged_weights(saved, tmp_path):
    path = damage(saved, tmp_path)
    for file in (path / "weights").rglob("d/*"):
        os.truncate(file, file.stat().st_size // 2)
    assert_refused(path, "the weights are damaged: .*; save the model again")


@pytest.fixture
def database(saved, tmp_path):
    """A copy of a saved model, and the database that holds its arrays, open for writing."""
    path = damage(saved, tmp_path)
    base = {"driver": "file", "path": f"{path}/weights/"}
    return path, tensorstore.KvStore.open({"driver": "ocdbt", "base": base}).result()


def change_array(store, name, **changes):
    key = f"{name}/.zarray".encode()
    store[key] = json.dumps(json.loads(store[key]) | changes).encode()


def test_lost_piece_is_not_read_as_zeros(database):
    path, store = database
    open_orbax_directory(path).check_whole()
    del store[b"layers.1.mlp.down/0.0"]
    with pytest.raises(CheckpointError, match=r"0 of 1 pieces of layers.1.mlp.down are there"):
        open_orbax_directory(path).check_whole()
    assert_refused(path, "the weights are damaged: .*layers.1.mlp.down.*save the model again")


def test_lost_and_foreign_arrays(database):
    path, store = database
    store[b"more/.zarray"] = store[b"embed/.zarray"]
    del store[b"head/.zarray"]
    assert_refused(path, r"1 missing: head \(16, 40\); 1 unexpected: more \(40, 16\)")


def test_array_that_claims_huge_pieces(database):
    path, store = database
    change_array(store, "embed", chunks=[1 << 20, 1 << 20])
    assert_refused(path, r"embed \(40, 16\) is stored in pieces of \[1048576, 1048576\]")


def test_array_of_another_type(database):
    path, store = database
    change_array(store, "head", dtype="<i4")
    assert_refused(path, "head is stored as int32, supported are float32, bfloat16, float16")


def test_config_of_another_model(saved, tmp_path):
    path = damage(saved, tmp_path)
    config = json.loads((path / "config.json").read_text())
    (path / "config.json").write_text(json.dumps(config | {"num_hidden_layers": 3}))
    assert_refused(path, "7 missing: layers.2.attn_norm.scale")
    (path / "config.json").write_text(json.dumps(config | {"vocab_size": 41}))
    assert_refused(path, r"2 of another shape: embed \(40, 16\), expected \(41, 16\)")
    (path / "config.json").unlink()
    assert_refused(path, "config.json: no such file")
