"""Processes of a process group: started once, they run functions of lib.shards for many tests."""

import importlib
import json
import os
import subprocess
import sys
import tempfile
import traceback
from datetime import timedelta


class Ranks:
    """Ranks of one group over gloo. A rank that raises or dies fails the call on every rank."""

    def __init__(self, count, **variables):
        self.folder = tempfile.TemporaryDirectory()
        env = {k: v for k, v in os.environ.items() if k not in ("RANK", "WORLD_SIZE")}
        env |= {"OMP_NUM_THREADS": "1", **variables}
        env["PYTHONPATH"] = os.pathsep.join(filter(None, sys.path))
        self.processes = [
            subprocess.Popen(
                [sys.executable, "-m", "lib.ranks", self.folder.name, str(rank), str(count)],
                stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=env,
            )
            for rank in range(count)
        ]  # fmt: skip

    def run(self, name, **arguments):
        """A function of lib.shards, as "module.function", on each rank: what rank 0 returns."""
        for process in self.processes:
            process.stdin.write(json.dumps([name, arguments]) + "\n")
            process.stdin.flush()
        results = [json.loads(p.stdout.readline() or '["died", null]') for p in self.processes]
        raised = [f"rank {rank}: {error}" for rank, (error, _) in enumerate(results) if error]
        assert not raised, "\n".join(raised)
        return results[0][1]

    def close(self):
        for process in self.processes:
            process.stdin.close()
        for process in self.processes:
            try:
                process.wait(20)
            except subprocess.TimeoutExpired:
                process.kill()
        self.folder.cleanup()


def serve(folder, rank, count):
    import torch
    import torch.distributed as dist

    torch.set_num_threads(1)
    answers, sys.stdout = sys.stdout, sys.stderr  # what libraries print is no answer
    dist.init_process_group(
        "gloo", init_method=f"file://{folder}/store", rank=rank, world_size=count,
        timeout=timedelta(seconds=60),
    )  # fmt: skip
    for line in sys.stdin:
        name, arguments = json.loads(line)
        module, _, function = name.partition(".")
        try:
            there = importlib.import_module(f"lib.shards.{module}")
            answer = [None, getattr(there, function)(count, **arguments)]
        except BaseException:
            answer = [traceback.format_exc(), None]
        print(json.dumps(answer), file=answers, flush=True)
    dist.destroy_process_group()


if __name__ == "__main__":
    serve(sys.argv[1], int(sys.argv[2]), int(sys.argv[3]))
