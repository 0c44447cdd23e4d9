"""Load the modules of one chapter without meeting those of another: seven folders all have a model.py.

    chapter = Chapter("chapter-01-foundations")
    chapter.model.Transformer(...)

Set CHAPTERS_ROOT to load from another copy of the repository: the planted bugs (planted_bugs/) do.
"""
import importlib
import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
CHAPTERS_ROOT = Path(os.environ.get("CHAPTERS_ROOT", ROOT))


class Chapter:
    """A chapter folder whose modules are attributes, imported on first use and kept out of sys.modules."""

    def __init__(self, name):
        self.folder = CHAPTERS_ROOT / name
        self.modules = {}

    def __getattr__(self, name):
        if not (self.folder / f"{name}.py").is_file():
            raise AttributeError(f"{self.folder} has no {name}.py")
        own = {path.stem for path in self.folder.glob("*.py")}
        others = {key: sys.modules.pop(key) for key in own & sys.modules.keys()}
        sys.modules.update(self.modules)
        sys.path.insert(0, str(self.folder))
        try:
            return importlib.import_module(name)
        finally:
            sys.path.remove(str(self.folder))
            self.modules = {key: sys.modules.pop(key) for key in own & sys.modules.keys()}
            sys.modules.update(others)

    def run(self, script, *arguments, check=True, timeout=300, **kwargs):
        """Run one of the chapter's scripts as a reader would; returns the finished process with its output as text."""
        command = [sys.executable, str(self.folder / script), *map(str, arguments)]
        done = subprocess.run(command, capture_output=True, text=True, timeout=timeout, **kwargs)
        if check and done.returncode != 0:
            raise AssertionError(f"{script} ended with status {done.returncode}\n{done.stdout}\n{done.stderr}")
        return done


CHAPTERS = sorted(path.name for path in CHAPTERS_ROOT.glob("chapter-0*"))
chapter1 = Chapter("chapter-01-foundations")
