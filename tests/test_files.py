"""A file is whole or not there: what stood at its path stays until the new one is complete."""

import os

import pytest
import safetensors
import safetensors.torch
import torch

from app.files import atomically, write_tensors, write_text


def test_what_is_written_takes_the_old_ones_place_and_leaves_nothing_beside_it(tmp_path):
    file = tmp_path / "a.json"
    file.write_text("old")
    with atomically(file) as temporary:
        assert temporary.parent == tmp_path
        temporary.write_text("new")
        assert file.read_text() == "old"
    assert file.read_text() == "new" and os.listdir(tmp_path) == ["a.json"]


@pytest.mark.parametrize("error", [OSError, KeyboardInterrupt])
def test_after_an_error_the_old_file_stands_and_no_temporary_one(error, tmp_path):
    file = tmp_path / "a.json"
    file.write_text("old")
    with pytest.raises(error), atomically(file) as temporary:
        temporary.write_text("half")
        raise error
    assert file.read_text() == "old" and os.listdir(tmp_path) == ["a.json"]


def test_text_is_written_in_utf_8(tmp_path):
    write_text(str(tmp_path / "a.txt"), "λ ≥ 0\n")
    assert (tmp_path / "a.txt").read_bytes() == "λ ≥ 0\n".encode()


def test_tensors_and_metadata_come_back(tmp_path):
    leaf = torch.arange(6.0).reshape(2, 3).requires_grad_()
    write_tensors(tmp_path / "a.safetensors", {"transposed": leaf.T, "leaf": leaf}, {"round": "3"})
    with safetensors.safe_open(tmp_path / "a.safetensors", "pt") as opened:
        assert opened.metadata() == {"round": "3"}
        assert torch.equal(opened.get_tensor("transposed"), leaf.detach().T)
    assert os.listdir(tmp_path) == ["a.safetensors"]
