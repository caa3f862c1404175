"""A strict session: no silent promotions, eight CPU devices, and in CI nothing is skipped.

And the fixtures of many files: the project's own files, and the command line with a tiny model.
"""

from __future__ import annotations

import importlib
import io
import os
import pathlib
import re
import shutil
import subprocess
import sys

import hypothesis
import jax
import pytest

ROOT = pathlib.Path(__file__).resolve().parent.parent
CI = os.environ.get("CI") == "true"

# The GPU kernels, and the interpreter that tests them, need a newer jax than Python 3.11 gets. On
# a newer Python with such an old jax CI does not go on without them.
KERNEL_TESTS = [
    "test_copies.py",
    "test_flash_decode.py",
    "test_flash_decode_lowering.py",
    "test_fused_interpreted.py",
    "test_merge_kernel.py",
    "test_merge_kernel_gpu.py",
    "test_norm.py",
    "test_peer_kernels.py",
    "test_prefill.py",
    "test_prefill_gpu.py",
    "test_read_kernel.py",
    "test_rope_append.py",
    "test_rope_append_gpu.py",
    "test_slots.py",
]
SEVERAL_GPUS = ["test_mailboxes_gpu.py", "test_peer_gpu.py"]
collect_ignore = KERNEL_TESTS if jax.__version_info__ < (0, 11, 2) else []

# Compiling takes longer than any deadline. In CI the examples are the same every time.
hypothesis.settings.register_profile("local", deadline=None)
hypothesis.settings.register_profile("ci", deadline=None, derandomize=True, print_blob=True)
hypothesis.settings.load_profile("ci" if CI else "local")


def pytest_addoption(parser):
    parser.addoption("--gpu-record", metavar="PATH", help="write what a run of -m gpu found")


def pytest_configure(config):
    if CI and collect_ignore and sys.version_info >= (3, 12):
        raise pytest.UsageError(
            "CI=true does not allow Python >= 3.12 to leave out the GPU kernels' tests, which need "
            f"jax >= 0.11.2: this is jax {jax.__version__}"
        )
    if config.option.gpu_record and not hasattr(config, "workerinput"):
        from gpu_record import GpuRecord

        config.pluginmanager.register(GpuRecord(pathlib.Path(config.option.gpu_record)))
    jax.config.update("jax_numpy_dtype_promotion", "strict")
    jax.config.update("jax_numpy_rank_promotion", "raise")
    jax.config.update("jax_num_cpu_devices", 8)
    if selects_gpu(config.option.markexpr):
        # The processes of -n share the GPU; by itself each would take three quarters of it.
        os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")
        if jax.default_backend() != "gpu":
            raise pytest.UsageError("-m gpu needs a GPU, and JAX found none")
    else:
        # On a machine with a GPU too, and in the processes that tests start.
        jax.config.update("jax_platforms", "cpu")
        os.environ["JAX_PLATFORMS"] = "cpu"


def pytest_ignore_collect(collection_path, config):
    """What several GPUs exchange has no tests for one."""
    if collection_path.name in SEVERAL_GPUS and selects_gpu(config.option.markexpr):
        return jax.device_count() == 1 or None
    return None


def selects_gpu(expression: str) -> bool:
    """Whether a marker expression such as "gpu and not slow" asks for the GPU tests."""
    return bool(re.search(r"(?<!not )\bgpu\b", expression))


def pytest_collection_modifyitems(items):
    """Marks the tests of the two lower rooms: test_<module>.py and test_<module>_<what>.py."""
    rooms = [ROOT / "models", ROOT / "pallas_kernels"]
    modules = [path.stem for room in rooms for path in room.glob("[!_]*.py")]
    for item in items:
        if any(f"{item.path.stem}_".startswith(f"test_{module}_") for module in modules):
            item.add_marker("contract")


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item, call):
    report = yield
    return fail_if_skipped(report) if CI else report


@pytest.hookimpl(wrapper=True)
def pytest_make_collect_report(collector):
    report = yield
    return fail_if_skipped(report) if CI else report


def fail_if_skipped(report):
    """In CI a skipped test is a hole that nobody sees. An expected failure is not a skip."""
    if report.skipped and not hasattr(report, "wasxfail"):
        report.outcome = "failed"
        report.longrepr = f"skipped, which CI=true does not allow: {report.longrepr}"
    return report


@pytest.fixture
def interpreter():
    """Runs the GPU kernels in Mosaic's interpreter, and fails the test on a race."""
    from kernel_runs import interpreted

    with interpreted():
        yield


@pytest.fixture
def interpreter_without_races():
    """The same for thread blocks that tell each other results without synchronisation."""
    from kernel_runs import interpreted

    with interpreted(detect_races=False):
        yield


@pytest.fixture(scope="session")
def project_root() -> pathlib.Path:
    return ROOT


@pytest.fixture
def script(project_root, monkeypatch):
    """script(name) imports a module of benchmarks/."""
    monkeypatch.syspath_prepend(project_root / "benchmarks")
    return importlib.import_module


@pytest.fixture(scope="session")
def project_files() -> list[pathlib.Path]:
    """The project's own files and links, relative to the root, whether or not there is a git."""
    command = ["git", "-C", str(ROOT), "ls-files", "-z", "-co", "--exclude-standard"]
    try:
        listed = subprocess.run(command, check=True, capture_output=True, text=True).stdout
        names = {pathlib.Path(name) for name in listed.split("\0") if name}
    except (OSError, subprocess.CalledProcessError):
        names = set()
    names = names or set(_walk(ROOT))
    return sorted(name for name in names if os.path.lexists(ROOT / name))


@pytest.fixture(scope="session")
def copy_tree(project_files):
    """copy_tree(target, links=True) copies the project; without links it is as a zip holds it."""

    def copy(target: pathlib.Path, links: bool = True) -> pathlib.Path:
        for name in project_files:
            source, copied = ROOT / name, target / name
            copied.parent.mkdir(parents=True, exist_ok=True)
            if not source.is_symlink():
                shutil.copy2(source, copied)
            elif links:
                copied.symlink_to(source.readlink())
            else:
                copied.write_text(str(source.readlink()))
        return target

    return copy


# The command line is imported late: tests of the two lower rooms do without its dependencies.


@pytest.fixture(scope="session")
def model(tmp_path_factory):
    """A folder with a tiny model that has a chat template; nobody writes there."""
    from cli_runs import make_model

    return make_model(tmp_path_factory.mktemp("models") / "chatty")


@pytest.fixture
def cli(capsys, monkeypatch):
    """cli(*arguments, stdin=b"") -> (exit code, stdout, stderr) of the command, in this process."""
    from jaxdecode.cli.app import run
    from jaxdecode.cli.output import Report

    def call(*arguments, stdin=b""):
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(stdin), encoding="utf-8"))
        capsys.readouterr()
        code = run([str(argument) for argument in arguments], Report())
        out, err = capsys.readouterr()
        assert "Traceback" not in out + err or "-v" in arguments
        return code, out, err

    return call


@pytest.fixture
def ask(cli, model):
    """`generate` on that or another model: eight tokens, and nothing kept between runs."""

    def call(*arguments, model=model, stdin=b""):
        options = ("-m", model, "--no-compilation-cache", "-n", 8)
        return cli("generate", *options, *arguments, stdin=stdin)

    return call


def _walk(folder: pathlib.Path):
    for path in folder.iterdir():
        if path.name in ("__pycache__", "build", "dist") or path.name.endswith(".egg-info"):
            continue
        if path.is_dir() and not path.is_symlink():
            if path.name == ".ci" or not path.name.startswith("."):
                yield from _walk(path)
        else:
            yield path.relative_to(ROOT)
