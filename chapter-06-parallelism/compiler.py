"""What torch.compile needs besides torch: a folder for what it makes and, on a CPU, a C++ compiler. Looked for before
the work, so that what lacks is said in a line and not, steps later, in fifty."""
import os
import shutil
import subprocess
import sysconfig
import tempfile

from cli import InputError

NEEDED = "g++ 12 or newer, or clang++, with OpenMP and Python's headers; CXX=NAME in the environment chooses one"
# Of C++20, and what each program of torch.compile includes.
TRIAL = "#include <concepts>\n#include <omp.h>\n#include <Python.h>\n"


def check_compiler(device):
    """Raises InputError if nothing can be compiled for the device."""
    try:
        # Not above: it takes a second, and where it can make no folder it ends in a traceback.
        import torch._inductor.config
        from torch._inductor.runtime.cache_dir_utils import cache_dir
        with tempfile.TemporaryFile(dir=cache_dir()) as file:
            file.write(bytes(1 << 20))   # a full disk has room for an empty file
    except OSError as error:
        raise InputError(f"torch.compile has no folder to write to ({error.filename or cache_dir()}: {error.strerror});"
                         " TORCHINDUCTOR_CACHE_DIR=DIR in the environment chooses one") from None
    if device != "cpu":
        return
    name = os.environ.get("CXX") or next(filter(shutil.which, ("g++", "clang++")), "g++")
    try:
        version = subprocess.run([name, "--version"], capture_output=True, text=True,
                                 check=True).stdout.partition("\n")[0]
    except (OSError, subprocess.CalledProcessError):
        raise InputError(f"a C++ compiler is needed, and {name} cannot be run: {NEEDED}") from None
    command = [name, "-std=c++20", "-fopenmp", f"-I{sysconfig.get_path('include')}", "-fsyntax-only", "-x", "c++", "-"]
    trial = subprocess.run(command, input=TRIAL, capture_output=True, text=True)
    if trial.returncode:
        problem = next((line for line in trial.stderr.splitlines() if "error" in line), "no reason given")
        raise InputError(f"{name} is {version}, and cannot compile what torch.compile writes ({problem}): {NEEDED}")
    os.environ["CXX"], torch._inductor.config.cpp.cxx = name, (None, name)   # for extensions, and for torch.compile
