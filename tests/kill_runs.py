"""Runs of `fastcls classify` that are killed at random moments, resumed, and compared with one that nobody disturbed.

Started by hand, not collected: python tests/kill_runs.py [--rounds 20] [--rows 2000] [--form jsonl] [--seed 0]

In each round the run is killed (SIGKILL) up to four times, each time after a random part of what it still needs, and
then resumed until it ends. The output and the errors file must be the undisturbed run's, byte for byte, and
nothing else may lie beside them. The exit status is 1 if something differs.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).parents[1]


def command(source: Path, target: Path) -> list[str]:
    options = ["--shard-rows", "50", "--resume", "--threads", "1", "--device", "cpu"]
    return [sys.executable, "-m", "fastcls", "classify", "--demo", str(source), "-o", str(target), *options]


def environment() -> dict[str, str]:
    paths = os.pathsep.join((str(ROOT), str(ROOT / "kernels"), os.environ.get("PYTHONPATH", "")))
    return {**os.environ, "PYTHONPATH": paths}


def content(target: Path) -> dict[str, bytes]:
    """What lies in the output's folder, but for the manifest."""
    files = [path for path in sorted(target.parent.rglob("*")) if path.is_file() and "manifest" not in path.name]
    return {str(path.relative_to(target.parent)): path.read_bytes() for path in files}


def finished(target: Path) -> int:
    """Shards that the manifest has."""
    record = target.with_name(f"{target.name}.manifest.jsonl")
    return max(record.read_bytes().count(b"\n") - 1, 0) if record.exists() else 0


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--rows", type=int, default=2000)
    parser.add_argument("--form", default="jsonl")
    parser.add_argument("--seed", type=int, default=0)
    asked = parser.parse_args()
    chance = random.Random(asked.seed)
    failed = kills = resumed = 0
    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder) / "in.jsonl"
        words = ["good", "bad", "film", "plot", "never", "always", "boring", "warm"]
        texts = [
            None if row % 97 == 5 else " ".join(chance.choices(words, k=chance.randint(1, 12)))
            for row in range(asked.rows)
        ]
        source.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
        calm = Path(folder) / "calm" / f"out.{asked.form}"
        started = time.perf_counter()
        subprocess.run(command(source, calm), check=True, env=environment(), capture_output=True)
        whole = time.perf_counter() - started
        expected = content(calm)
        for number in range(asked.rounds):
            target = Path(folder) / f"round{number}" / f"out.{asked.form}"
            for _ in range(4):
                before = finished(target)
                with subprocess.Popen(command(source, target), env=environment(), stderr=subprocess.DEVNULL) as process:
                    try:
                        # Half of the kills fall into the start of the process, where little is to be broken.
                        process.wait(chance.uniform(whole / 2, whole * 1.05))
                    except subprocess.TimeoutExpired:
                        process.kill()
                        kills += 1
                if process.returncode == 0:
                    break
                resumed += finished(target) > before
            subprocess.run(command(source, target), check=True, env=environment(), capture_output=True)
            if content(target) != expected:
                failed += 1
                print(f"round {number}: differs: {sorted(content(target))}")
    print(f"{asked.form}: {asked.rounds} rounds, {kills} kills, {resumed} of them after new shards, {failed} differ")
    return int(failed > 0)


if __name__ == "__main__":
    sys.exit(main())
