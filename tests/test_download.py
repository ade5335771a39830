"""download.py: reading without running anything, fetching whole or not at all, fitting SiT weights to a mask model."""

from __future__ import annotations

import argparse
import functools
import hashlib
import io
import json
import pickle
import threading
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

import download
from common.errors import InputError
from download import adapt_sit_weights, find_model, find_weights, mean_rows
from models import SiT

NAME = "tiny.pt"


def tiny(**changes) -> SiT:
    """A small SiT with random numbers in every tensor (a fresh one is zero where adaLN-Zero starts)."""
    sizes = {
        "input_size": 8,
        "patch_size": 2,
        "in_channels": 3,
        "hidden_size": 24,
        "depth": 2,
        "num_heads": 2,
        "num_classes": 5,
    }
    torch.manual_seed(0)
    model = SiT(**(sizes | changes))
    for name, parameter in model.named_parameters():
        if "pos_embed" not in name:
            torch.nn.init.normal_(parameter, std=0.1)
    return model


@pytest.fixture
def weights() -> dict[str, torch.Tensor]:
    return tiny().state_dict()


def same(left: dict, right: dict) -> bool:
    return left.keys() == right.keys() and all(torch.equal(left[key], right[key]) for key in left)


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
    assert same(found.state_dict, ema) and found.entry == "ema" and found.config is None


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
def test_file_that_is_no_weights_is_named(tmp_path, content, words):
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
        (lambda w: w.update({"final_layer.linear.bias": torch.full((12,), torch.nan)}), "NaN"),
        (lambda w: w.update({"note": "hello"}), "no tensors: note"),
        (lambda w: w.clear(), "no tensors"),
    ],
)
def test_state_dict_that_is_no_sit_says_why(tmp_path, weights, change, words):
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
    assert same(find_weights(NAME, tmp_path).state_dict, weights)
    assert leftovers(tmp_path) == {NAME, NAME + ".sha256"}
    assert (tmp_path / f"{NAME}.sha256").read_text() == f"{hashlib.sha256(site.body).hexdigest()}  {NAME}\n"
    find_weights(NAME, tmp_path)
    assert site.requests == 1


def test_file_that_changed_since_the_download_is_refused(tmp_path, site, weights):
    find_weights(NAME, tmp_path)
    torch.save({key: value + 1 for key, value in weights.items()}, tmp_path / NAME)
    for name in (NAME, tmp_path / NAME):
        with pytest.raises(InputError, match="changed since"):
            find_weights(name, tmp_path)


def test_published_file_that_changed_on_the_server_is_refused_and_not_kept(tmp_path, site, weights):
    (tmp_path / f"{NAME}.sha256").write_text(f"{'0' * 64}  {NAME}\n")
    with pytest.raises(InputError, match="to accept the new one"):
        find_weights(NAME, tmp_path)
    assert leftovers(tmp_path) == {NAME + ".sha256"}


def test_file_put_there_by_hand_is_recorded_at_first_use(tmp_path, site, weights):
    torch.save(weights, tmp_path / NAME)
    find_weights(NAME, tmp_path)
    assert site.requests == 0 and leftovers(tmp_path) == {NAME, NAME + ".sha256"}


def test_torn_file_put_there_by_hand_is_not_recorded(tmp_path, site):
    (tmp_path / NAME).write_bytes(site.body[:999])
    with pytest.raises(InputError, match="damaged"):
        find_weights(NAME, tmp_path)
    assert leftovers(tmp_path) == {NAME}


def faults(site: Site) -> dict:
    """Every way in which a download goes wrong: name -> (what the site does, words of the message)."""
    whole = site.body
    return {
        "html": ({"body": b"<html>sign in</html>", "kind": "text/html"}, "web page"),
        "cut by the connection": ({"body": whole[:-500], "length": len(whole)}, "bytes|cannot fetch"),
        "empty": ({"body": b""}, "0 of 0 bytes"),
        "gone": ({"status": 404}, "cannot fetch"),
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
        find_weights(NAME, tmp_path)
    assert leftovers(tmp_path) == set()
    site.body, site.status, site.length = whole, 200, None
    find_weights(NAME, tmp_path)


def test_no_network_names_the_address_and_the_place(tmp_path, monkeypatch):
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    monkeypatch.setattr(download, "PUBLISHED_URLS", {NAME: "http://127.0.0.1:9/nothing"})
    with pytest.raises(InputError) as caught:
        find_weights(NAME, tmp_path)
    message = str(caught.value)
    assert "http://127.0.0.1:9/nothing" in message and str(tmp_path / NAME) in message
    assert leftovers(tmp_path) == set()


def test_other_network_under_a_published_name_is_refused(tmp_path, site, monkeypatch):
    monkeypatch.setattr(download, "PUBLISHED_SHAPES", {NAME: download.SiTShape(28, 1152, 2, 4, 8, 1001)})
    with pytest.raises(InputError, match="SiT-XL/2"):
        find_weights(NAME, tmp_path)
    assert leftovers(tmp_path) == set()


def test_published_shape_is_that_of_the_registry_entry():
    with torch.device("meta"):
        model = SiT(32, 2, 4, 1152, 28, 16, num_classes=1000, learn_sigma=True)
    assert download.sit_shape(model.state_dict()) == download.PUBLISHED_SHAPES["SiT-XL-2-256x256.pt"]


# --- fitting ---------------------------------------------------------------------------------------------------------


def test_mean_rows_take_the_first_channels_of_every_pixel_not_the_first_half():
    p, channels = 2, 3
    # Row value = 100 * patch row + 10 * patch column + output channel, in the order in which SiT unpatchifies.
    rows = torch.tensor([100 * i + 10 * j + c for i in range(p) for j in range(p) for c in range(2 * channels)])
    expected = [100 * i + 10 * j + c for i in range(p) for j in range(p) for c in range(channels)]
    assert mean_rows(rows, p, channels).tolist() == expected
    weight = rows[:, None].expand(-1, 7)
    assert mean_rows(weight, p, channels)[:, 4].tolist() == expected
    assert rows[: p * p * channels].tolist() != expected


def test_learn_sigma_weights_give_the_mean_half_of_the_image(weights):
    source = tiny(learn_sigma=True, num_classes=2).eval()
    target = tiny(num_classes=2).eval()
    state_dict, report = adapt_sit_weights(source.state_dict(), target)
    target.load_state_dict(state_dict, strict=True)
    x, t = torch.randn(2, 3, 8, 8), torch.tensor([0.2, 0.7])
    y = torch.zeros(2, 2, 8, 8)
    y[:, 1] = 1
    patches = {}
    for name, model in (("source", source), ("target", target)):
        model.final_layer.linear.register_forward_hook(lambda _m, _i, out, name=name: patches.update({name: out}))
        model(x, t, y)
    both = patches["source"].reshape(2, 4, 4, 2, 2, 6)  # (B, gh, gw, p, p, 2C)
    mean = patches["target"].reshape(2, 4, 4, 2, 2, 3)
    torch.testing.assert_close(mean, both[..., :3])
    assert report.converted == ["final_layer.linear.weight", "final_layer.linear.bias"]


def test_class_table_is_replaced_and_everything_of_the_trunk_is_kept(weights):
    model = tiny(num_classes=2, mask_pixels=2)
    fresh = {key: value.clone() for key, value in model.state_dict().items()}
    imagenet = {key: value + 1 for key, value in tiny(num_classes=1000).state_dict().items()}
    state_dict, report = adapt_sit_weights(imagenet, model)
    model.load_state_dict(state_dict, strict=True)
    assert report.new == ["y_embedder.embedding_table.weight", "mask_detail.proj.weight"]
    assert report.dropped == ["y_embedder.embedding_table.weight"]
    for key in fresh:
        assert torch.equal(state_dict[key], fresh[key] if key in report.new else imagenet[key]), key
    assert set(report.kept) | set(report.new) == set(fresh)
    assert any("mask_detail.proj.weight" in line for line in report.lines())


def test_position_table_of_another_grid_is_the_models_own(weights):
    model = tiny(input_size=12)
    state_dict, report = adapt_sit_weights(weights, model)
    assert report.new == ["pos_embed"] and report.dropped == ["pos_embed"]
    assert torch.equal(state_dict["pos_embed"], model.state_dict()["pos_embed"])
    assert state_dict["pos_embed"].shape == (1, 36, 24)


def test_mask_model_of_the_same_classes_is_kept_whole(weights):
    source = tiny(mask_pixels=2)
    state_dict, report = adapt_sit_weights(source.state_dict(), tiny(mask_pixels=2))
    assert not report.new and not report.dropped and same(state_dict, dict(source.state_dict()))


def test_other_patch_with_equal_row_count_is_not_mistaken_for_the_same():
    # p = 2, C = 16 and p = 4, C = 4 both have 64 output rows, which mean different pixels.
    source = tiny(patch_size=2, in_channels=16)
    model = tiny(patch_size=4, in_channels=4, input_size=16)
    fresh = model.state_dict()["final_layer.linear.weight"].clone()
    state_dict, report = adapt_sit_weights(source.state_dict(), model)
    assert "final_layer.linear.weight" in report.new
    assert torch.equal(state_dict["final_layer.linear.weight"], fresh)


def test_the_callers_tensors_are_not_shared_with_the_model(weights):
    state_dict, _ = adapt_sit_weights(weights, tiny())
    state_dict["blocks.0.attn.qkv.weight"].zero_()
    assert weights["blocks.0.attn.qkv.weight"].abs().sum() > 0


@pytest.mark.parametrize("change", [{"hidden_size": 48}, {"depth": 3}, {"mlp_ratio": 2.0}])
def test_weights_of_another_size_are_refused(weights, change):
    with pytest.raises(InputError, match="--init-from"):
        adapt_sit_weights(weights, tiny(**change))


def test_refusal_names_both_sizes():
    with torch.device("meta"):
        model = SiT(32, 2, 4, 768, 12, 12)
    with pytest.raises(InputError, match="the weights are 2 blocks of width 24.*the model is SiT-B/2"):
        adapt_sit_weights(tiny().state_dict(), model)
