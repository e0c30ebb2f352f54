"""Programs in processes of their own that have imported torch already: the import takes two seconds."""

import json
import os
import subprocess
import sys
import tempfile
import traceback


class Torch:
    """A process that has imported torch, and nothing of quantkit, and forks for each program."""

    def __init__(self):
        command = [sys.executable, "-W", "always::UserWarning", __file__]
        self.process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )

    def run(self, program, folder, **variables):
        """Runs a program beside the modules of a folder; returns what subprocess.run() does.

        Of this process's QUANTKIT_ variables it sees none.
        """
        env = {k: v for k, v in os.environ.items() if not k.startswith("QUANTKIT_")}
        self.process.stdin.write(json.dumps([program, str(folder), env | variables]) + "\n")
        self.process.stdin.flush()
        return subprocess.CompletedProcess(program, *json.loads(self.process.stdout.readline()))

    def close(self):
        self.process.stdin.close()
        self.process.wait()


def child(program, folder, env, outputs):
    code = 1
    for number, file in enumerate(outputs, 1):
        os.dup2(file.fileno(), number)
    try:
        os.environ.clear()
        os.environ.update(env)
        os.chdir(folder)
        sys.path[0] = folder  # was this file's
        exec(program, {"__name__": "__main__"})
        code = 0
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def serve():
    import torch  # noqa: F401

    for line in sys.stdin:
        with tempfile.TemporaryFile("w+") as out, tempfile.TemporaryFile("w+") as err:
            pid = os.fork()
            if pid == 0:
                child(*json.loads(line), (out, err))
            code = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
            texts = []
            for file in (out, err):
                file.seek(0)
                texts.append(file.read())
            print(json.dumps([code, *texts]), flush=True)


if __name__ == "__main__":
    serve()
