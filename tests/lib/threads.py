"""Python threads that begin at the same time."""

import threading


def in_threads(work, count):
    """work(i) in each of `count` new threads at the same time; what was raised there is raised here."""
    start, failures = threading.Barrier(count), []

    def guarded(i):
        try:
            start.wait(60)
            work(i)
        except BaseException as error:
            failures.append(error)

    workers = [threading.Thread(target=guarded, args=(i,)) for i in range(count)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    if failures:
        raise failures[0]
