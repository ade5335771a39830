"""download.py: weights are read without running code, and downloaded completely or not at all."""

from __future__ import annotations

import argparse
import errno
import functools
import hashlib
import io
import json
import pickle
import socket
import subprocess
import sys
import threading
import zipfile
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from tiny_sit import same, tiny

import download
from common.errors import InputError
from download import find_model, find_weights
from models import SIZES, SiT, SiT_models

NAME = "tiny.pt"


@pytest.fixture(autouse=True)
def download_folder(tmp_path, monkeypatch):
    monkeypatch.setattr(download, "DOWNLOAD_FOLDER", tmp_path)


@pytest.fixture
def weights() -> dict[str, torch.Tensor]:
    return tiny().state_dict()


# --- reading ---------------------------------------------------------------------------------------------------------


def test_bare_state_dict_comes_back_as_it_was(tmp_path, weights):
    torch.save(weights, tmp_path / NAME)
    assert same(find_model(tmp_path / NAME), weights)
    assert find_weights(tmp_path / NAME).config is None


def test_sit_training_checkpoint_gives_the_ema_and_loads_its_namespace(tmp_path, weights):
    ema = {key: value + 1 for key, value in weights.items()}
    args = argparse.Namespace(model="SiT-XL/2", num_classes=1000)
    torch.save({"model": weights, "ema": ema, "opt": {"state": {}}, "args": args}, tmp_path / NAME)
    found = find_weights(tmp_path / NAME)
    assert same(found.state_dict, ema) and found.config is None


def test_namespace_is_allowed_only_while_our_reader_reads(tmp_path, weights):
    torch.save({"ema": weights, "args": argparse.Namespace(a=1)}, tmp_path / NAME)
    find_model(tmp_path / NAME)
    with pytest.raises(pickle.UnpicklingError):
        torch.load(tmp_path / NAME, weights_only=True)


def test_own_checkpoint_gives_its_config(tmp_path, weights):
    config = {"model": {"depth": 2}, "step": 7}
    torch.save({"model": weights, "ema": weights, "opt": {}, "step": 7, "config": config}, tmp_path / NAME)
    assert find_weights(tmp_path / NAME).config == config


def test_prefixes_of_ddp_and_compile_come_off(tmp_path, weights):
    torch.save({"model": {f"module._orig_mod.{key}": value for key, value in weights.items()}}, tmp_path / NAME)
    assert same(find_model(tmp_path / NAME), weights)


def test_safetensors_gives_weights_and_config(tmp_path, weights):
    file = tmp_path / "tiny.safetensors"
    save_file(weights, file, metadata={"config": json.dumps({"image_size": 64})})
    found = find_weights(file)
    assert same(found.state_dict, weights) and found.config == {"image_size": 64}


class Poison:
    """Unpickling this writes a file: the proof that something ran."""

    def __init__(self, proof: Path) -> None:
        self.proof = proof

    def __reduce__(self):
        return (Path.write_text, (self.proof, "ran"))


@pytest.mark.parametrize("writer", ["torch", "pickle"])
def test_poisoned_pickle_runs_nothing(tmp_path, weights, writer):
    proof, file = tmp_path / "proof", tmp_path / "poison.pt"
    content = {"ema": weights, "args": Poison(proof)}
    if writer == "torch":
        torch.save(content, file)
    else:
        file.write_bytes(pickle.dumps(content))
    with pytest.raises(InputError, match="poison.pt"):
        find_model(file)
    assert not proof.exists()
    torch.load(file, weights_only=False) if writer == "torch" else pickle.loads(file.read_bytes())
    assert proof.exists(), "the poison of this test has no effect, so the test proves nothing"


def test_poison_inside_a_namespace_runs_nothing(tmp_path, weights):
    proof = tmp_path / "proof"
    torch.save({"ema": weights, "args": argparse.Namespace(x=Poison(proof))}, tmp_path / NAME)
    with pytest.raises(InputError, match="could run code"):
        find_model(tmp_path / NAME)
    assert not proof.exists()


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"", "empty"),
        (b"\n <!DOCTYPE html><html>not found</html>", "web page"),
        (b"\x80\x02garbage", "damaged"),
        (bytes(range(256)) * 9, "damaged"),
        (pickle.dumps([1, 2]), "not a state dict|damaged"),
    ],
)
def test_a_file_that_is_not_weights_is_named(tmp_path, content, words):
    file = tmp_path / "bad.pt"
    file.write_bytes(content)
    with pytest.raises(InputError, match=words) as caught:
        find_model(file)
    assert "bad.pt" in str(caught.value)


@pytest.mark.parametrize("suffix", [".pt", ".safetensors"])
@pytest.mark.parametrize("share", [0.1, 0.5, 0.99])
def test_truncated_file_is_refused(tmp_path, weights, suffix, share):
    file = tmp_path / f"torn{suffix}"
    save_file(weights, file) if suffix == ".safetensors" else torch.save(weights, file)
    whole = file.read_bytes()
    file.write_bytes(whole[: int(len(whole) * share)])
    with pytest.raises(InputError, match="torn"):
        find_model(file)


def test_unknown_name_lists_the_published_ones(tmp_path):
    with pytest.raises(InputError, match="SiT-XL-2-256x256.pt"):
        find_model(tmp_path / "absent.pt")
    with pytest.raises(InputError, match="folder"):
        find_model(tmp_path)


def broken(weights, change):
    weights = dict(weights)
    change(weights)
    return weights


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda w: w.pop("blocks.1.mlp.fc2.bias"), r"1 tensors missing: blocks\.1\.mlp\.fc2\.bias"),
        (lambda w: w.pop("x_embedder.proj.weight"), "no x_embedder.proj.weight"),
        (lambda w: w.update({"blocks.1.attn.qkv.weight": torch.zeros(5, 5)}), r"blocks\.1\.attn\.qkv\.weight \(5, 5\)"),
        (lambda w: w.update({"x_embedder.proj.weight": torch.zeros(3)}), "dimensions"),
        (lambda w: w.update({"x_embedder.proj.weight": torch.zeros(8, 3, 0, 0)}), "dimensions"),
        (lambda w: w.update({"blocks.0.mlp.fc1.weight": torch.tensor(1.0)}), "dimensions"),
        (lambda w: w.update({"final_layer.linear.bias": torch.full((12,), torch.nan)}), "NaN"),
        (lambda w: w.update({"note": "hello"}), "not tensors: note"),
        (lambda w: w.clear(), "no tensors"),
    ],
)
def test_a_state_dict_of_another_model_is_refused_with_the_reason(tmp_path, weights, change, words):
    torch.save(broken(weights, change), tmp_path / NAME)
    with pytest.raises(InputError, match=words):
        find_model(tmp_path / NAME)


# --- fetching --------------------------------------------------------------------------------------------------------


class Site:
    """A local server of one file, whose answer the test chooses."""

    def __init__(self) -> None:
        self.body, self.status, self.length, self.requests = b"", 200, None, 0
        self.kind = "application/octet-stream"
        outer = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                outer.requests += 1
                self.send_response(outer.status)
                self.send_header("Content-Type", outer.kind)
                self.send_header("Content-Length", str(outer.length or len(outer.body)))
                self.end_headers()
                self.wfile.write(outer.body)

            def log_message(self, *args) -> None:
                pass

        self.server = HTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server.server_port}/weights"
        threading.Thread(target=functools.partial(self.server.serve_forever, 0.02), daemon=True).start()


@pytest.fixture
def site(monkeypatch, weights):
    site = Site()
    stream = io.BytesIO()
    torch.save(weights, stream)
    site.body = stream.getvalue()
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    monkeypatch.setattr(download, "PUBLISHED_URLS", {NAME: site.url})
    monkeypatch.setattr(download, "PUBLISHED_SHAPES", {})
    yield site
    site.server.shutdown()
    site.server.server_close()


def leftovers(folder: Path) -> set[str]:
    return {path.name for path in folder.glob("*") if path.suffix != ".lock"}


def test_download_is_kept_with_its_measured_hash_and_fetched_once(tmp_path, site, weights):
    assert same(find_weights(NAME).state_dict, weights)
    assert leftovers(tmp_path) == {NAME, NAME + ".sha256"}
    assert (tmp_path / f"{NAME}.sha256").read_text() == f"{hashlib.sha256(site.body).hexdigest()}  {NAME}\n"
    find_weights(NAME)
    assert site.requests == 1


def test_file_that_changed_since_the_download_is_refused(tmp_path, site, weights):
    find_weights(NAME)
    torch.save({key: value + 1 for key, value in weights.items()}, tmp_path / NAME)
    for name in (NAME, tmp_path / NAME):
        with pytest.raises(InputError, match="changed since"):
            find_weights(name)


def test_published_file_that_changed_on_the_server_is_refused_and_not_kept(tmp_path, site, weights):
    (tmp_path / f"{NAME}.sha256").write_text(f"{'0' * 64}  {NAME}\n")
    with pytest.raises(InputError, match="to accept the new one"):
        find_weights(NAME)
    assert leftovers(tmp_path) == {NAME + ".sha256"}


def test_file_put_there_by_hand_is_recorded_at_first_use(tmp_path, site, weights):
    torch.save(weights, tmp_path / NAME)
    find_weights(NAME)
    assert site.requests == 0 and leftovers(tmp_path) == {NAME, NAME + ".sha256"}


def test_torn_file_put_there_by_hand_is_not_recorded(tmp_path, site):
    (tmp_path / NAME).write_bytes(site.body[:999])
    with pytest.raises(InputError, match="damaged"):
        find_weights(NAME)
    assert leftovers(tmp_path) == {NAME}


def faults(site: Site) -> dict:
    """Every way in which a download goes wrong: name -> (what the site does, words of the message)."""
    whole = site.body
    return {
        "html": ({"body": b"<html>sign in</html>", "kind": "text/html"}, "web page"),
        "cut by the connection": ({"body": whole[:-500], "length": len(whole)}, "bytes|cannot download"),
        "empty": ({"body": b""}, "gave 0 bytes"),
        "gone": ({"status": 404}, "cannot download"),
        "not weights": ({"body": b"\x00" * 4000}, "damaged"),
        "torn on the server": ({"body": whole[: len(whole) // 2]}, "damaged"),
    }


@pytest.mark.parametrize(
    "fault", ["html", "cut by the connection", "empty", "gone", "not weights", "torn on the server"]
)
def test_failed_download_leaves_nothing_and_the_next_one_works(tmp_path, site, fault):
    whole = site.body
    behaviour, words = faults(site)[fault]
    for key, value in behaviour.items():
        setattr(site, key, value)
    with pytest.raises(InputError, match=words):
        find_weights(NAME)
    assert leftovers(tmp_path) == set()
    site.body, site.status, site.length = whole, 200, None
    find_weights(NAME)


def test_no_network_names_the_address_and_the_place(tmp_path, monkeypatch):
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    monkeypatch.setattr(download, "PUBLISHED_URLS", {NAME: "http://127.0.0.1:9/nothing"})
    with pytest.raises(InputError) as caught:
        find_weights(NAME)
    message = str(caught.value)
    assert "http://127.0.0.1:9/nothing" in message and str(tmp_path / NAME) in message
    assert leftovers(tmp_path) == set()


def test_other_network_under_a_published_name_is_refused(tmp_path, site, monkeypatch):
    monkeypatch.setattr(download, "PUBLISHED_SHAPES", {NAME: download.SiTShape(28, 1152, 2, 4, 8, 1001)})
    with pytest.raises(InputError, match="SiT-XL/2"):
        find_weights(NAME)
    assert leftovers(tmp_path) == set()


def test_published_shape_is_that_of_the_registry_entry():
    with torch.device("meta"):
        model = SiT(32, 2, 4, 1152, 28, 16, num_classes=1000, learn_sigma=True)
    assert download.sit_shape(model.state_dict()) == download.PUBLISHED_SHAPES["SiT-XL-2-256x256.pt"]


def test_every_registered_model_is_named_by_its_tensors():
    for name, build in SiT_models.items():
        with torch.device("meta"):
            model = build(input_size=32, in_channels=4, num_classes=2)
        assert str(download.sit_shape(model.state_dict())).startswith(f"{name} ("), name
    assert (12, 192) not in {sizes[:2] for sizes in SIZES.values()}
    assert str(download.SiTShape(12, 192, 2, 4, 4, 3)).startswith("12 blocks of width 192")


@pytest.mark.parametrize("kind", ["compressed", "stretched"])
def test_a_file_that_would_unpack_to_far_more_than_its_size_is_refused(tmp_path, weights, kind):
    if kind == "compressed":
        with zipfile.ZipFile(tmp_path / NAME, "w", zipfile.ZIP_DEFLATED) as archive:
            archive.writestr("archive/data.pkl", bytes(10**7))
    else:  # strides of 0: four bytes that claim to be four terabytes
        torch.save(weights | {"x_embedder.proj.weight": torch.zeros(1).expand(10**6, 10**6, 1, 1)}, tmp_path / NAME)
    with pytest.raises(InputError, match="would unpack to more than its own size"):
        find_model(tmp_path / NAME)


def test_a_server_that_falls_silent_is_given_up(tmp_path, monkeypatch):
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    monkeypatch.setattr(download, "TIMEOUT_SECONDS", 0.3)
    with socket.create_server(("127.0.0.1", 0)) as silent:
        url = f"http://127.0.0.1:{silent.getsockname()[1]}/nothing"
        monkeypatch.setattr(download, "PUBLISHED_URLS", {NAME: url})
        with pytest.raises(InputError, match="cannot download tiny.pt .*timed out"):
            find_weights(NAME)
    assert leftovers(tmp_path) == set()
    assert socket.getdefaulttimeout() is None


def test_what_a_killed_download_left_is_removed_by_the_next(tmp_path, site):
    (tmp_path / f".{NAME}.0123abcd.pt").write_bytes(b"half")
    find_weights(NAME)
    assert leftovers(tmp_path) == {NAME, NAME + ".sha256"}


def hold_lock(path: Path) -> subprocess.Popen:
    code = f"""if True:
        import sys
        from filelock import FileLock
        with FileLock({str(path)!r}):
            print("held", flush=True)
            sys.stdin.read()"""
    holder = subprocess.Popen([sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    assert holder.stdout is not None
    holder.stdout.readline()
    return holder


def test_waiting_for_another_process_is_logged_and_ends(tmp_path, site, monkeypatch, caplog):
    caplog.set_level("INFO")
    monkeypatch.setattr("common.locks.LONGEST_WAIT_SECONDS", 0.2)
    with hold_lock(tmp_path / f"{NAME}.lock") as holder:
        with pytest.raises(InputError, match=r"another process that downloads tiny\.pt"):
            find_weights(NAME)
        assert "waiting for another process that downloads tiny.pt" in caplog.text
        monkeypatch.setattr("common.locks.LONGEST_WAIT_SECONDS", 60)
        threading.Timer(0.3, holder.stdin.close).start()
        find_weights(NAME)
    assert site.requests == 1


@pytest.mark.parametrize("code", [errno.ENOLCK, errno.EOPNOTSUPP])
def test_a_download_works_on_a_file_system_without_locks(tmp_path, site, monkeypatch, caplog, code):
    def refuse(*arguments: object) -> None:
        raise OSError(code, "no locks")

    monkeypatch.setattr("fcntl.flock", refuse)
    find_weights(NAME)
    assert (tmp_path / NAME).is_file() and "no file locks here" in caplog.text
