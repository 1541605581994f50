"""Runs of `fastcls classify --ray` whose workers are killed at random moments, compared with one that nobody disturbed.

Started by hand, not collected: python tests/kill_workers.py [--kills 20] [--rows 40000] [--seed 0]

Workers (SIGKILL) are killed until there were so many kills, in as many runs as that takes. Each output must be the
undisturbed run's, byte for byte: no row lost, none doubled, all in order. The exit status is 1 if something differs.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from kill_runs import environment


def workers(of: int) -> list[int]:
    """The processes of the cluster that a run has started, by their numbers."""
    found = []
    for path in Path("/proc").glob("[0-9]*"):
        try:
            # Ray's workers are the children of its node's process, which is the run's.
            if (path / "cmdline").read_bytes().startswith(b"ray::Worker") and of in ancestors(int(path.name)):
                found.append(int(path.name))
        except OSError:
            continue
    return found


def ancestors(process: int) -> list[int]:
    found = []
    while process > 1:
        process = int((Path("/proc") / str(process) / "stat").read_text().rpartition(")")[2].split()[1])
        found.append(process)
    return found


def command(source: Path, target: Path) -> list[str]:
    options = ["--ray", "local", "--shard-rows", "500", "--overwrite", "--device", "cpu"]
    return [sys.executable, "-m", "fastcls", "classify", "--demo", str(source), "-o", str(target), *options]


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--rows", type=int, default=40_000)
    parser.add_argument("--seed", type=int, default=0)
    asked = parser.parse_args()
    chance = random.Random(asked.seed)
    kills = runs = failed = 0
    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder) / "in.jsonl"
        words = ["good", "bad", "film", "plot", "never", "always", "boring", "warm"]
        texts = [
            None if row % 97 == 5 else " ".join(chance.choices(words, k=chance.randint(1, 40)))
            for row in range(asked.rows)
        ]
        source.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
        calm = Path(folder) / "calm.jsonl"
        subprocess.run(command(source, calm), check=True, env=environment(), capture_output=True)
        while kills < asked.kills:
            target = Path(folder) / f"run{runs}.jsonl"
            here = 0
            with subprocess.Popen(
                command(source, target), env=environment(), stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True
            ) as process:
                while process.poll() is None:
                    # A worker takes some seconds to be there again; killed six times before, it would end the run.
                    time.sleep(chance.uniform(2, 12))
                    parts = list(target.parent.glob(f"{target.name}.parts/part-*"))
                    if kills < asked.kills and parts and (found := workers(process.pid)):
                        os.kill(chance.choice(found), signal.SIGKILL)
                        kills, here = kills + 1, here + 1
                said = (process.stderr.read() if process.stderr else "").strip()
            same = process.returncode == 0 and target.read_bytes() == calm.read_bytes()
            errors = [Path(f"{path}.errors.jsonl") for path in (target, calm)]
            same = same and errors[0].read_bytes() == errors[1].read_bytes()
            failed += not same
            runs += 1
            print(
                f"run {runs}: {here} kills, {'the same' if same else 'DIFFERENT'}; {said.splitlines()[-1:]}", flush=True
            )
    print(f"{runs} runs, {kills} kills, {failed} differ")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
