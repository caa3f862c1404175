"""Decode speed of SmolLM2-135M on the CPU: jaxdecode beside transformers + torch, in one run.

    python benchmarks/cpu_generate.py [--peer-python PYTHON] [--tokens 128] [--repeats 3]

Each (implementation, dtype) runs alone in a process of its own, on all cores, greedy, batch 1.
jaxdecode reads the GGUF file; transformers reads the same weights unpacked into safetensors of the
dtype, and once the GGUF file itself, whose 4-bit weights it keeps packed. A row's tok_s is the
median over the repeats of the tokens generated after the first, over the time between the first and
the last: neither compilation nor prefill counts. Rounds alternate between the implementations, so
that a machine that slows down slows all of them.
PYTHON is one with torch, transformers and gguf; this one when not given.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import pathlib
import platform
import statistics
import subprocess
import sys
import tempfile
import time

from source_hash import ROOT, source_hash

CASES = [
    ("jaxdecode", "float32"),
    ("jaxdecode", "bfloat16"),
    ("transformers", "float32"),
    ("transformers", "bfloat16"),
    ("transformers, 4-bit", "float32"),
]
PROMPT = list(range(100, 132))  # ids of ordinary tokens; the text does not matter to the time


def main() -> None:
    """Runs every case and writes the results file."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--peer-python", default=sys.executable, help="Python with transformers")
    parser.add_argument("--tokens", type=int, default=128)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--output", default=ROOT / "benchmarks/results/cpu/cpu_generate.json")
    parser.add_argument("--worker", nargs=3, metavar=("IMPLEMENTATION", "DTYPE", "MODEL"))
    options = parser.parse_args()
    if options.worker:
        implementation, dtype, path = options.worker
        worker = time_jaxdecode if implementation == "jaxdecode" else time_transformers
        print(json.dumps(worker(dtype, pathlib.Path(path), options.tokens)))
        return
    results = run_all(options.peer_python, options.tokens, options.repeats)
    output = pathlib.Path(options.output)
    output.parent.mkdir(parents=True, exist_ok=True)
    output.write_text(json.dumps(results, indent=1) + "\n")
    print(table(results))


def run_all(peer_python: str, tokens: int, repeats: int) -> dict:
    """One round after the other over all cases; returns the content of the results file."""
    measured: dict[tuple[str, str], list[dict]] = {case: [] for case in CASES}
    with tempfile.TemporaryDirectory() as folder:
        models = model_files(pathlib.Path(folder))
        for _ in range(repeats):
            for case in CASES:
                python = sys.executable if case[0] == "jaxdecode" else peer_python
                worker = ["--worker", *case, str(models[case])]
                command = [python, __file__, "--tokens", str(tokens), *worker]
                done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
                measured[case].append(json.loads(done.stdout.splitlines()[-1]))
    rows = [
        {
            "model": "smollm2-135m",
            "implementation": implementation,
            "dtype": dtype,
            "batch": 1,
            "tokens": tokens,
            "tok_s": round(statistics.median(run["tok_s"] for run in runs), 2),
            "tok_s_runs": [round(run["tok_s"], 2) for run in runs],
            "version": runs[0]["version"],
            "same_tokens": runs[0]["ids"] == measured["jaxdecode", "float32"][0]["ids"],
        }
        for (implementation, dtype), runs in measured.items()
    ]
    return {
        "device": f"{cpu_name()}, {len(os.sched_getaffinity(0))} cores",
        "jax": measured["jaxdecode", "float32"][0]["version"],
        "source": source_hash(),
        "date": datetime.date.today().isoformat(),
        "rows": rows,
    }


def model_files(folder: pathlib.Path) -> dict[tuple[str, str], pathlib.Path]:
    """What each case reads: the GGUF file, or its weights as safetensors of the case's dtype."""
    from jaxdecode.checkpoint import export_safetensors, open_source
    from jaxdecode.checkpoint.default_model import fetch_default_model

    gguf = fetch_default_model(on_message=lambda line: print(line, file=sys.stderr))
    files = dict.fromkeys(CASES, gguf)
    for dtype in ("float32", "bfloat16"):
        files["transformers", dtype] = folder / dtype
        export_safetensors(open_source(gguf), folder / dtype, dtype=dtype)
    return files


def time_jaxdecode(dtype: str, path: pathlib.Path, tokens: int) -> dict:
    """Generates once to compile, then once with the clock."""
    import jax

    import jaxdecode as jd

    model, _ = jd.load(path, dtype=dtype)
    params = jd.SamplingParams(max_tokens=tokens + 1, ignore_eos=True)
    jd.generate(model, None, PROMPT, params)
    (result,) = jd.generate(model, None, PROMPT, params)
    rate = result.stats.generation_tps
    return {"tok_s": rate, "version": jax.__version__, "ids": result.tokens}


def time_transformers(dtype: str, path: pathlib.Path, tokens: int) -> dict:
    """Times tokens + 1 new tokens and one new token; the difference is that of `tokens` steps."""
    import torch
    import transformers

    torch.set_num_threads(len(os.sched_getaffinity(0)))
    options = {"dtype": getattr(torch, dtype), "local_files_only": True}
    if path.is_file():
        options["gguf_file"] = path.name
    folder = path.parent if path.is_file() else path
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, **options)
    ids = torch.tensor([PROMPT])

    def generate(count: int) -> tuple[float, list[int]]:
        start = time.perf_counter()
        with torch.inference_mode():
            out = model.generate(
                ids,
                attention_mask=torch.ones_like(ids),
                do_sample=False,
                min_new_tokens=count,
                max_new_tokens=count,
            )
        return time.perf_counter() - start, out[0, len(PROMPT) :].tolist()

    generate(4)
    first, _ = generate(1)
    seconds, out = generate(tokens + 1)
    version = f"{transformers.__version__}, torch {torch.__version__}"
    return {"tok_s": tokens / (seconds - first), "version": version, "ids": out}


def table(results: dict) -> str:
    """The results as a Markdown table, with each one's ratio to the best of transformers."""
    best = max(row["tok_s"] for row in results["rows"] if row["implementation"] != "jaxdecode")
    lines = ["| implementation | dtype | tok/s | times transformers' best |", "|---|---|---|---|"]
    lines += [
        f"| {row['implementation']} | {row['dtype']} | {row['tok_s']:.1f} "
        f"| {row['tok_s'] / best:.2f} |"
        for row in results["rows"]
    ]
    return "\n".join(lines)


def cpu_name() -> str:
    """The processor's name, as the system tells it."""
    try:
        lines = pathlib.Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine()


if __name__ == "__main__":
    main()
