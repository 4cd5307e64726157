"""Fixtures of several test files."""
import os
import shutil

# of this process and of those that it starts: a second thread gains little on so few pictures, and loses much where
# other programs hold its core. torch reads it when it is imported
os.environ["OMP_NUM_THREADS"] = "1"

import pytest
import torch

from helpers import ROOT, Place


@pytest.fixture
def place(tmp_path):
    return Place(tmp_path)

@pytest.fixture(scope="session")
def usual(tmp_path_factory):
    """(place, report, stdout) of a run as a user starts it, on six pictures of each split and all cores. No test
    changes it."""
    place = Place(tmp_path_factory.mktemp("usual"))
    status, out, err = place.run(BATCH_SIZE=4, environment={"OMP_NUM_THREADS": str(os.cpu_count())})
    assert (status, err) == (0, ""), err
    return place, place.last_report(), out

@pytest.fixture
def rerun(place, usual):
    """A place whose results/ is that of the run `usual`."""
    shutil.copytree(usual[0].results, place.results)
    return place

@pytest.fixture(scope="session")
def state():
    return torch.load(ROOT / "BEST_checkpoint.pth.tar", weights_only=True)["model"]
