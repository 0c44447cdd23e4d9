"""The device that computes: which one, what it is called, and how much of its memory was in use."""
import ctypes
import os
import platform
import resource
from pathlib import Path

import torch

from cli import InputError


def choose_device(name):
    """The device of --device: the name itself, for "auto" the fastest that there is.

    InputError if there is none of that name.
    """
    available = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available(), "cpu": True}
    if name == "auto":
        return next(device for device, found in available.items() if found)
    if not available[name]:
        raise InputError(f"--device {name}: this machine or this build of torch has none; use --device auto")
    return name


def device_name(device="cpu"):
    """The processor's or the GPU's name, as a person would say it."""
    if str(device).startswith("cuda"):
        return torch.cuda.get_device_name(device)
    name = platform.processor() or platform.machine()
    if os.path.exists("/proc/cpuinfo"):
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        name = next((line.split(":")[1].strip() for line in lines if line.startswith("model name")), name)
    return f"{name}, {os.cpu_count()} cores"


def peak_memory(device):
    """Highest memory use so far, in bytes: of the GPU, or of this process."""
    if device == "cuda":
        return torch.cuda.max_memory_allocated()
    status = Path("/proc/self/status")   # Linux; its ru_maxrss begins with the memory of whoever started this process
    if status.exists():
        return int(status.read_text().partition("VmHWM:")[2].split()[0]) * 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss   # macOS counts it in bytes


def keep_memory():
    """Let glibc keep the memory that torch frees, for the next tensor. Elsewhere than on Linux this does nothing.

    It gives each block of 128 KiB or more back to the system at once, and the system hands out every page of a new one
    emptied: two thousand interruptions in a step of the small model.
    """
    libc = ctypes.CDLL(None)
    if hasattr(libc, "mallopt"):
        libc.mallopt(-3, 32 << 20)   # M_MMAP_THRESHOLD, in bytes: the largest that is allowed
        libc.mallopt(-1, 1 << 30)    # M_TRIM_THRESHOLD: free bytes at the end of the heap before any go back
