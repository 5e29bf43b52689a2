"""The parts of gpu_suite.sh: each a command with a time limit and the packages it needs, its JSON kept as soon as it ends."""

import importlib.util
import json
import os
import platform
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass, field
from datetime import date
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Annotated, Any

import typer

HERE = Path(__file__).parent
CONFIGURED = ("pydantic", "tomli_w", "safetensors")  # whatever reads a configuration or writes a run
PYTHON = sys.executable


@dataclass(frozen=True)
class Part:
    name: str
    command: list[str]  # its last line on stdout is one JSON object
    seconds: int  # at most
    needs: tuple[str, ...] = field(default=())


def check(name: str, device: str, data: Path, seconds: int, needs: tuple[str, ...] = ()) -> Part:
    command = [PYTHON, str(HERE / "gpu_checks.py"), name, "--device", device, "--data", str(data)]
    return Part(f"check {name}", command, seconds, needs)


def plan(data: Path, device: str, rehearse: bool) -> list[Part]:
    """In order of what would be missed most where the time runs out."""
    place, rounds = ["--device", device], ["--rounds", "1", "--steps", "1"] if rehearse else ["--rounds", "5"]
    engine = [PYTHON, str(HERE / "bench_engine.py"), str(data), *place, "--json", *rounds]
    retrain = [PYTHON, str(HERE / "bench_retrain.py"), str(data), *place, "--json", *(["--rehearse"] if rehearse else [])]
    paper = [PYTHON, str(HERE / "gpu_suite.py"), "paper-run", str(data), device, str(int(rehearse))]
    detector = [PYTHON, str(HERE / "bench_detector.py"), *place, "--json",
                *(["--size", "64", "--batch", "1", "--categories", "20", "--rounds", "1"] if rehearse else [])]  # fmt: skip
    on_gpu = device.startswith("cuda")
    return [
        check("losses", device, data, 60),
        check("influence", device, data, 60),
        check("augment", device, data, 60),
        check("resume", device, data, 120, CONFIGURED),
        check("sync-batch-norm", device, data, 60),
        Part("paper preset", paper, 300, CONFIGURED),
        Part("bench_engine", [*engine, "--nets", "resnet32"], 150, CONFIGURED),
        Part("bench_engine plain", [*engine, "--nets", "resnet32", "--compile", "off"], 90, CONFIGURED),
        *([Part("bench_engine cuda-graphs", [*engine, "--nets", "resnet32", "--compile", "cuda-graphs"], 150, CONFIGURED)]
          if on_gpu else []),
        Part("bench_retrain", retrain, 120, (*CONFIGURED, "higher")),
        Part("bench_detector", detector, 120, CONFIGURED),
        check("compile", device, data, 150, CONFIGURED),
        Part("bench_engine resnet50", [*engine, "--nets", "resnet50"], 120, CONFIGURED),
        check("decode", device, data, 60, CONFIGURED),
    ]  # fmt: skip


def run(part: Part, seconds: float) -> dict[str, Any]:
    """What a part found: ``status`` passed, failed, skipped or out of time, and its JSON."""
    missing = [name for name in part.needs if importlib.util.find_spec(name) is None]
    if missing:
        return {"status": "skipped", "why": f"missing: {', '.join(missing)}"}
    if seconds < 10:
        return {"status": "skipped", "why": "the time was used up"}
    began = time.monotonic()
    try:
        done = subprocess.run(part.command, capture_output=True, text=True, timeout=min(seconds, part.seconds), check=False)
    except subprocess.TimeoutExpired:
        return {"status": "out of time", "seconds": round(time.monotonic() - began, 1)}
    found: dict[str, Any] = {"seconds": round(time.monotonic() - began, 1)}
    try:
        result = json.loads(done.stdout.strip().splitlines()[-1])
    except (IndexError, ValueError):
        return {"status": "failed", **found, "why": done.stderr.strip()[-800:]}
    if result.get("passed", True) is None:
        return {"status": "skipped", **found, "why": "; ".join(result.get("skipped", []))}
    return {"status": "passed" if done.returncode == 0 else "failed", **found, "result": result}


def paper_run(data: Path, device: str, rehearse: bool) -> dict[str, Any]:
    """CIFAR-100-LT at imbalance factor 200 with the preset ``paper``: what a user types, in one workspace."""
    with tempfile.TemporaryDirectory() as folder:

        def balms(*arguments: str, options: tuple[str, ...] = ()) -> dict[str, Any]:
            command = [PYTHON, "-m", "balms_cli", *arguments, "--json", "--quiet", "--workspace", folder, *options]
            done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
            return json.loads(done.stdout)

        place = ("--device", device)
        few = ("--steps", "4", "--set", "warmup_steps=1") if rehearse else ()
        manifest = balms("make-lt", "cifar100", "--imbalance", "200", options=("--data-root", str(data), "--offline"))
        began = time.monotonic()
        stage1 = balms("pretrain", options=(*place, "--preset", "paper", *few))
        found = {"data": "cifar100-lt IF 200", "manifest_sha256": manifest["manifest_sha256"],
                 "pretrain": {k: v for k, v in stage1.items() if k != "run"},
                 "pretrain_wall_seconds": round(time.monotonic() - began, 1)}  # fmt: skip
        bank = ("--set", "views=1", "--set", "class_rows=1") if rehearse else ()
        for name, options in {"balanced": ("--loss", "balanced"), "balms": ("--loss", "balanced", "--meta-sampler")}.items():
            began = time.monotonic()
            options += (*place, "--preset", "paper", "--out", f"{folder}/{name}", *few, *bank)
            balms("retrain", stage1["run"], options=options)
            found[f"retrain_{name}_wall_seconds"] = round(time.monotonic() - began, 1)
        for name, where in {"softmax": stage1["run"], "balanced": f"{folder}/balanced", "balms": f"{folder}/balms"}.items():
            scores = balms("evaluate", where, options=place)
            found[name] = {m: scores[m] for m in ("top1", "balanced_accuracy", "many", "medium", "few")}
    return found


def device_facts(device: str) -> dict[str, Any]:
    import torch

    packages = ("torch", "torchvision", "numpy", "pydantic", "higher", "safetensors", "typer")
    facts: dict[str, Any] = {"device": torch.cuda.get_device_name(device) if device.startswith("cuda") else "cpu",
                             "date": date.today().isoformat(), "python": platform.python_version()}  # fmt: skip
    for name in packages:
        try:
            facts[name] = version(name)
        except PackageNotFoundError:
            facts[name] = "missing"
    return facts


def main(
    data_root: Annotated[Path, typer.Argument(help="Folder with cifar10.zip and cifar100.zip.", exists=True)],
    out: Annotated[Path, typer.Option(help="The result, written anew after every part.")] = HERE / "results" / "gpu_suite.json",
    device: Annotated[str, typer.Option(help="cuda (or cpu, with --rehearse).")] = "cuda",
    limit: Annotated[int, typer.Option(help="Seconds in all.")] = 540,
    rehearse: Annotated[bool, typer.Option("--rehearse", help="A few steps of everything, to see that it runs.")] = False,
):
    import torch

    if device.startswith("cuda") and not torch.cuda.is_available():
        raise typer.BadParameter("torch sees no GPU here (--device cpu --rehearse shows whether the suite itself runs)")
    began = time.monotonic()
    result: dict[str, Any] = {"command": "examples/gpu_suite.sh DATA_ROOT" + (" --rehearse" if rehearse else ""),
                              "rehearsal": rehearse, **device_facts(device), "parts": {}}  # fmt: skip
    for part in plan(data_root, device, rehearse):
        print(f"{time.monotonic() - began:5.0f} s  {part.name}", file=sys.stderr, flush=True)
        found = run(part, limit - (time.monotonic() - began))
        result["parts"][part.name] = found
        result["seconds"] = round(time.monotonic() - began, 1)
        scratch = out.with_suffix(".part")
        scratch.write_text(json.dumps(result, indent=1) + "\n")
        os.replace(scratch, out)
        print(f"         {found['status']}{': ' + found['why'] if 'why' in found else ''}", file=sys.stderr, flush=True)
    bad = [name for name, found in result["parts"].items() if found["status"] in ("failed", "out of time")]
    print(f"{len(result['parts']) - len(bad)} of {len(result['parts'])} parts without failure in {result['seconds']} s; {out}",
          file=sys.stderr)  # fmt: skip
    raise typer.Exit(1 if bad else 0)


if __name__ == "__main__":
    if sys.argv[1:2] == ["paper-run"]:
        print(json.dumps(paper_run(Path(sys.argv[2]), sys.argv[3], sys.argv[4] == "1")))
    else:
        typer.run(main)
