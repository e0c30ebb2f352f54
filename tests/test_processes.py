"""Forked and spawned processes, many Python threads, and the interpreter lock."""

import multiprocessing
import os
import sys
import threading
import time
from pathlib import Path

import pytest
import torch
from lib.backends import daily
from lib.cases import assert_same, values
from lib.threads import in_threads
from torch.utils.data import DataLoader, Dataset

import quantkit
from quantkit import _load, reference

ROOT = Path(__file__).resolve().parent.parent
pytestmark = pytest.mark.fallback
needs_extension = pytest.mark.skipif(_load.extension is None, reason="the reference is torch's own")
needs_fork = pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork() here")


@pytest.fixture
def run(torch_process):
    """Runs a program in a new process, from which it can fork without harm to this one."""

    def check(program):
        done = torch_process.run(program, ROOT)
        assert done.returncode == 0, done.stdout + done.stderr

    return check


FORKS = """
import os, signal, sys, torch, quantkit
torch.set_num_threads(1)
x = torch.randn(2000, 2000)
expected = quantkit.quantize_dequant(x, True)[:2]
wide = torch.zeros(2, 2000, 2000)

def tasks():
    return len(os.listdir("/proc/self/task")) if os.path.isdir("/proc/self/task") else None

def fork(threads, in_child, starts):
    torch.set_num_threads(threads)
    pid = os.fork()
    if pid == 0:
        signal.alarm(60)
        torch.set_num_threads(threads)
        before = tasks()
        made = quantkit.quantize_dequant(x, True)[:2]
        assert before is None or tasks() - before == starts, (before, tasks())
        # Copied back, and not by torch's threads either.
        p = {"scale": wide[0].t(), "zero_point": wide[1].t()}
        torch.ops.quantkit.choose_qparams.out(x, [1, 1], -128, 127, 1e-8, True, **p)
        assert quantkit.backend().threads == in_child, quantkit.backend()
        torch.set_num_threads(1)  # for torch's own comparison
        os._exit(0 if all(map(torch.equal, made, expected)) else 1)
    assert os.waitpid(pid, 0)[1] == 0
    assert quantkit.backend().threads == threads

fork(1, 1, 0)
fork(2, 2, 1)  # of a process without OpenMP threads: it keeps its own
torch.set_num_threads(4)
BEGIN
fork(4, 1, 0)
assert all(map(torch.equal, quantkit.quantize_dequant(x, True)[:2], expected))
"""


@needs_fork
@needs_extension
@pytest.mark.parametrize(
    "begin", ["x.add(1)", "quantkit.quantize_dequant(x)"], ids=["torch", "quantkit"]
)
def test_a_forked_child_works_whoever_had_threads(begin, run):
    """torch's own operators would hang in the child of a process with OpenMP threads."""
    run(FORKS.replace("BEGIN", begin))


class Quantized(Dataset):
    def __init__(self, x):
        self.x = x

    def __len__(self):
        return len(self.x)

    def __getitem__(self, i):
        q, qparams = quantkit.dynamic_quantize(self.x[i], True, sym=False)
        return q, qparams.scale, qparams.zero_point


METHODS = multiprocessing.get_all_start_methods()


@pytest.mark.parametrize("method", daily(METHODS, "fork", "spawn"))
def test_data_loader_workers(method, several_threads):
    x = values((4, 300, 400), torch.float32)
    quantkit.quantize_dequant(x)  # the parent has used its threads
    loader = DataLoader(
        Quantized(x), batch_size=2, num_workers=1, multiprocessing_context=method, timeout=100
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

    def work(i):
        for _ in range(3):
            q, x_hat, p = quantkit.quantize_dequant(x[i], True, sym=False)
            assert_same((q, x_hat, p.scale), (*right[i][:2], right[i][2].scale))

    in_threads(work, 64)


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
def test_threads_are_those_of_the_calling_thread_and_of_one_runtime(run):
    program = """
import os, re, threading, torch, quantkit
x = torch.randn(2000, 2000)
def count():
    torch.set_num_threads(threads)
    before = len(os.listdir("/proc/self/task"))
    assert quantkit.backend().threads == threads
    quantkit.quantize_dequant(x)
    began = len(os.listdir("/proc/self/task")) - before
    mapped = re.findall("/[^ ]*/lib[gi]?omp[^ ]*\\n", open("/proc/self/maps").read())
    os._exit(0 if began == threads - 1 and len(set(mapped)) == 1 else 1)
for threads in (1, 3):  # a process for each: threads take their time to end
    pid = os.fork()
    if pid == 0:
        threading.Thread(target=count).start()
        threading.Event().wait(60)
        os._exit(2)
    assert os.waitpid(pid, 0)[1] == 0, threads
"""
    if not os.path.isdir("/proc/self/task"):
        pytest.skip("threads cannot be counted here")
    run(program)
