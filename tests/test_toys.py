"""Chapter 6's toys: each compares two ranks with one process and prints what is equal; and each can fail."""
import contextlib
import io
import runpy

import pytest
import torch
import torch.distributed as dist


def play(chapter, name, wrong):
    """In a rank: (what the toy prints, whether its comparison failed).

    What the function `wrong` of dist delivers is one too much.
    """
    def one_too_much(tensor, *arguments, _deliver=getattr(dist, wrong, None), **keywords):
        _deliver(tensor, *arguments, **keywords)
        tensor.add_(1)
    printed, dtype = io.StringIO(), torch.get_default_dtype()
    with contextlib.redirect_stdout(printed), pytest.MonkeyPatch.context() as patch:
        # This process is a rank already, and stays one.
        for started in ("init_process_group", "destroy_process_group"):
            patch.setattr(dist, started, lambda *_: None)
        if wrong:
            patch.setattr(dist, wrong, one_too_much)
        try:
            runpy.run_path(str(chapter.folder / f"{name}.py"), run_name="__main__")
        except AssertionError:
            return printed.getvalue(), True
        finally:
            torch.set_default_dtype(dtype)
    return printed.getvalue(), False


@pytest.mark.parametrize("name, collective, lines", [
    ("toy_tensor_parallel", "all_reduce", 3), ("toy_zero", "reduce_scatter", 1), ("toy_pipeline", "recv", 1)])
def test_two_ranks_equal_one_process(ranks, name, collective, lines):
    for rank, (printed, failed) in enumerate(ranks(2, play, name, "")):
        assert not failed
        assert [f"rank {rank}: " in line and "equal" in line
                for line in printed.splitlines()] == [True] * lines, printed
    assert any(failed for _, failed in ranks(2, play, name, collective))
