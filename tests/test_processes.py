"""Forked and spawned processes, many Python threads, and the interpreter lock."""

import multiprocessing
import os
import subprocess
import sys
import threading
import time

import pytest
import torch
from lib.cases import assert_same, values
from torch.utils.data import DataLoader, Dataset

import quantkit
from quantkit import _load, reference

pytestmark = pytest.mark.fallback
needs_extension = pytest.mark.skipif(_load.extension is None, reason="the reference is torch's own")
needs_fork = pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork() here")


def run(program, *arguments, **options):
    """A new process's output, from which a test can fork without harm to this one."""
    command = [sys.executable, "-W", "ignore", "-c", program, *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, **options)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


FORK = """
import os, signal, sys, torch, quantkit
x = torch.randn(2000, 2000)
torch.set_num_threads(int(sys.argv[1]))
expected = quantkit.quantize_dequant(x, True)[:2]
wide = torch.zeros(2, 2000, 2000)
if sys.argv[2] == "torch":
    x.add(1)
pid = os.fork()
if pid == 0:
    signal.alarm(60)
    torch.set_num_threads(int(sys.argv[1]))
    made = quantkit.quantize_dequant(x, True)[:2]
    p = {"scale": wide[0].t(), "zero_point": wide[1].t()}  # copied back: not by torch's threads either
    torch.ops.quantkit.choose_qparams.out(x, [1, 1], -128, 127, 1e-8, True, **p)
    torch.set_num_threads(1)  # for torch's own comparison
    same = all(map(torch.equal, made, expected))
    os._exit(0 if same and quantkit.backend().threads == 1 else 1)
assert os.waitpid(pid, 0)[1] == 0
assert all(map(torch.equal, quantkit.quantize_dequant(x, True)[:2], expected))
print(quantkit.backend().threads)
"""


@needs_fork
@needs_extension
@pytest.mark.parametrize("who", ["quantkit", "torch"])
@pytest.mark.parametrize("threads", [1, 4])
def test_a_forked_child_works_whoever_had_threads(threads, who):
    """torch's own operators would wait for ever in the child of a process with OpenMP threads."""
    assert int(run(FORK, threads, who)) == threads


@needs_fork
@needs_extension
def test_a_child_of_a_process_without_openmp_threads_keeps_its_own():
    program = """
import os, signal, torch, quantkit
assert quantkit.backend().threads == 2
pid = os.fork()
if pid == 0:
    signal.alarm(60)
    x = torch.randn(2000, 2000)
    before = len(os.listdir("/proc/self/task"))
    quantkit.quantize_dequant(x)
    began = len(os.listdir("/proc/self/task")) - before
    os._exit(0 if quantkit.backend().threads == 2 and began == 1 else 1)
assert os.waitpid(pid, 0)[1] == 0
"""
    if not os.path.isdir("/proc/self/task"):
        pytest.skip("threads cannot be counted here")
    run(program, env=os.environ | {"OMP_NUM_THREADS": "2"})


class Quantized(Dataset):
    def __init__(self, x):
        self.x = x

    def __len__(self):
        return len(self.x)

    def __getitem__(self, i):
        q, qparams = quantkit.dynamic_quantize(self.x[i], True, sym=False)
        return q, qparams.scale, qparams.zero_point


@pytest.mark.parametrize("method", multiprocessing.get_all_start_methods())
def test_data_loader_workers(method):
    x = values((4, 300, 400), torch.float32)
    quantkit.quantize_dequant(x)  # the parent has used its threads
    loader = DataLoader(
        Quantized(x), batch_size=2, num_workers=2, multiprocessing_context=method, timeout=100
    )
    batches = list(loader)
    right = [
        reference.dynamic_quantize_op(each, [1, -1], -128, 127, 1e-8, False, torch.int8)
        for each in x
    ]
    for i in range(3):
        made = torch.cat([batch[i] for batch in batches])
        assert_same(made, torch.stack([r[i] for r in right]))


def test_sixty_four_threads_at_once():
    x = values((64, 200, 300), torch.float32)
    right = [reference.quantize_dequant(each, True, sym=False) for each in x]
    start, failures = threading.Barrier(64), []

    def work(i):
        try:
            start.wait(60)
            for _ in range(3):
                q, x_hat, p = quantkit.quantize_dequant(x[i], True, sym=False)
                assert_same((q, x_hat, p.scale), (*right[i][:2], right[i][2].scale))
        except BaseException as error:
            failures.append(error)

    threads = [threading.Thread(target=work, args=(i,)) for i in range(64)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures


@needs_extension
def test_kernels_run_without_the_interpreter_lock():
    """While one thread is in an operator another one runs Python."""
    x, out = torch.ones(1 << 25), torch.empty(1 << 25, dtype=torch.int8)
    args = (x, torch.tensor(0.1), torch.tensor(0.0), -128, 127, torch.int8)
    turns, during, done = 0, [], threading.Event()

    def work():
        torch.set_num_threads(1)
        for _ in range(5):
            before = turns
            torch.ops.quantkit.quantize.out(*args, out=out)
            during.append(turns - before)
        done.set()

    worker = threading.Thread(target=work)
    interval = sys.getswitchinterval()
    sys.setswitchinterval(1000)  # only a thread that gives the lock up lets another one run
    try:
        worker.start()
        while not done.is_set():
            turns += 1
            time.sleep(0)
    finally:
        sys.setswitchinterval(interval)
    worker.join()
    assert max(during) > 10, during


@needs_extension
def test_there_is_one_openmp_runtime():
    program = """
import re, torch, quantkit
torch.set_num_threads(2)
quantkit.quantize_dequant(torch.randn(2000, 2000))
mapped = re.findall(r"/\\S+", open("/proc/self/maps").read())
print(*{path for path in mapped if re.search(r"/lib[gi]?omp", path)})
"""
    if not os.path.exists("/proc/self/maps"):
        pytest.skip("libraries cannot be listed here")
    assert len(run(program).split()) == 1


@needs_extension
@pytest.mark.parametrize("threads", [1, 3])
def test_the_number_of_threads_is_that_of_the_calling_thread(threads):
    program = """
import os, sys, threading, torch, quantkit
x = torch.randn(2000, 2000)
threads, seen = int(sys.argv[1]), []
def count():
    torch.set_num_threads(threads)
    before = len(os.listdir("/proc/self/task"))
    assert quantkit.backend().threads == threads
    quantkit.quantize_dequant(x)
    seen.append(len(os.listdir("/proc/self/task")) - before)
worker = threading.Thread(target=count)
worker.start()
worker.join()
print(*seen)
"""
    if not os.path.isdir("/proc/self/task"):
        pytest.skip("threads cannot be counted here")
    assert int(run(program, threads)) == threads - 1
