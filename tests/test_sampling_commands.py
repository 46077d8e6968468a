"""Commands that sample and edit, each run in a process."""

import contextlib
import re
import socket
import time

import numpy as np
import pytest
from PIL import Image

from tests.helpers.commands import REPOSITORY, Command, command
from tests.helpers.xla_flags import fake_devices

IMAGE_BYTES = 8 * 8 * 3
COUNT = 300
# sample.py on a device without memory for decoding.
OUT_OF_MEMORY = """
import jax, sample
from absl import app

def decode_steps(self, tokens):
    print("samples.npz when pictures are drawn:", (sample.out_folder() / "samples.npz").exists())
    raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory allocating 9 bytes.")

sample.var_jax.LoadedTokenizer.decode_steps = decode_steps
app.run(sample.main)
"""
# sample.py with another bias in the last layer of the decoder.
OTHER_DECODER = """
import sample
from absl import app

load = sample.cli.load

def other():
    model = load()
    last = model.tokenizer.params["decoder"]["conv_out"]
    last["bias"] = last["bias"] + 0.5
    return model

sample.cli.load = other
app.run(sample.main)
"""
# Messages of sample.py about its flags.
OUT_FOLDER = """
import sample
from absl import app, flags
from absl.testing import flagsaver

for wrong in (
    ["--labels=1", "--classes=2"],
    ["--labels=1", "--num_per_class=2"],
    ["--workdir=gs://bucket/run"],
    ["--workdir=gs://bucket/run", "--out=gs://bucket/out"],
    ["--seed=4294967296"],
    ["--seed=-1"],
):
    with flagsaver.flagsaver():
        try:
            flags.FLAGS(["sample.py", *wrong])
            sample.out_folder()
        except (app.UsageError, flags.IllegalFlagValueError) as error:
            print(error)
"""


def sampled(run, out, *flags, devices: int = 1) -> tuple[bytes, np.ndarray]:
    """Sample from the tiny run; return the bytes of the file, and the images."""
    flags = (f"--workdir={run}", f"--out={out}", f"--num_per_class={COUNT // 10}", *flags)
    done = command("sample.py", *flags, xla_flags=fake_devices(devices))
    assert done.returncode == 0, done.stderr[-2000:]
    with np.load(out / "samples.npz") as samples:
        assert samples["arr_1"].tolist() == np.tile(np.arange(10), COUNT // 10).tolist()
        return (out / "samples.npz").read_bytes(), samples["arr_0"].astype(int)


@pytest.fixture(scope="module")
def unbroken(tiny_run, tmp_path_factory):
    return sampled(tiny_run, tmp_path_factory.mktemp("unbroken"), "--batch=2")


def killed_after(run, out, images: int) -> int:
    """Start sampling, kill it once `images` are on disk, and return the number of images on disk."""
    flags = (f"--workdir={run}", f"--out={out}", f"--num_per_class={COUNT // 10}", "--batch=2")
    process = Command("sample.py", *flags)
    file, deadline = out / "samples.partial" / "images.uint8", time.monotonic() + 120
    done = lambda: file.stat().st_size // IMAGE_BYTES if file.exists() else 0
    while done() < images and time.monotonic() < deadline and process.poll() is None:
        time.sleep(0.002)
    process.kill()
    process.communicate()
    return done()


def test_killed_three_times_it_makes_the_same_file_byte_for_byte(tiny_run, unbroken, tmp_path):
    previous = 0
    for images in (20, 100, 180):
        count = killed_after(tiny_run, tmp_path, images)
        assert max(images, previous) <= count < COUNT  # it resumed, and was killed before the end
        previous = count
        assert not (tmp_path / "samples.npz").exists()
    file, images = sampled(tiny_run, tmp_path, "--batch=2", "--pngs")
    assert file == unbroken[0]
    assert not (tmp_path / "samples.partial").exists()
    # PNGs of the images before the last kill, too.
    names = sorted(path.name for path in (tmp_path / "images").iterdir())
    assert names == [f"{i:06d}_class{i % 10:04d}.png" for i in range(COUNT)]
    np.testing.assert_array_equal(Image.open(tmp_path / "images" / names[3]), images[3])


def test_pictures_that_do_not_fit_are_a_warning_and_the_same_command_draws_them(tiny_run, tmp_path):
    flags = (f"--workdir={tiny_run}", f"--out={tmp_path}", "--num_per_class=2")
    done = command("-c", OUT_OF_MEMORY, *flags)
    assert done.returncode == 0, done.stderr[-2000:]
    assert f"warning: {tmp_path}/scales.png could not be written: RESOURCE_EXHAUSTED: Out of m" in done.stderr
    assert "samples.npz is complete; run the same command again to write it" in done.stderr
    assert "samples.npz when pictures are drawn: True" in done.stdout
    written = (tmp_path / "samples.npz").stat().st_mtime_ns
    assert (tmp_path / "samples.png").exists() and not (tmp_path / "scales.png").exists()
    done = command("sample.py", *flags, "--pngs")
    assert done.returncode == 0 and "samples.npz, tokens.npy, samples.png, scales.png, images/" in done.stdout
    assert Image.open(tmp_path / "scales.png").size == (3 * 50 + 2, 10 * 50 + 2)
    assert len(list((tmp_path / "images").iterdir())) == 20
    assert (tmp_path / "samples.npz").stat().st_mtime_ns == written  # nothing is generated again


def test_batch_and_devices_do_not_decide_the_images(tiny_run, unbroken, tmp_path):
    """To 1/255, where a sum in another order falls on the other side of a rounding."""
    _, sevens = sampled(tiny_run, tmp_path / "7", "--batch=7")
    _, many = sampled(tiny_run, tmp_path / "64", "--batch=64")
    _, sharded = sampled(tiny_run, tmp_path / "sharded", devices=8)
    for images in (sevens, many, sharded):
        assert np.abs(images - unbroken[1]).max() <= 1


def two_hosts(run, out, *flags) -> list[Command]:
    """Start two processes on loopback with two devices each; process 0 writes to out/0."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    flags += (f"--workdir={run}", f"--coordinator=localhost:{port}", "--num_processes=2", "--host_timeout=10")
    return [
        Command("sample.py", *flags, f"--process_id={i}", f"--out={out}/{i}", xla_flags=fake_devices(2))
        for i in (0, 1)
    ]


def test_two_hosts_share_the_work(tiny_run, unbroken, tmp_path):
    hosts = two_hosts(tiny_run, tmp_path, f"--num_per_class={COUNT // 10}", "--batch=8")
    errors = [host.communicate(timeout=600)[1] for host in hosts]
    assert [host.returncode for host in hosts] == [0, 0], errors[0][-2000:] + errors[1][-2000:]
    with np.load(tmp_path / "0" / "samples.npz") as samples:
        assert np.abs(samples["arr_0"].astype(int) - unbroken[1]).max() <= 1
    assert not (tmp_path / "1").exists()


@pytest.mark.parametrize("failure", ["other samples", "full disk"])
def test_when_the_writing_host_fails_both_end_with_its_message(tiny_run, small_disk, failure):
    """Fail at the start, on unfinished samples of another job, or in the middle, on a full disk."""
    message, images = "sample.py: samples could not be written under", 6000
    if failure == "other samples":
        message, images = "sample.py: .* holds unfinished samples of another call", 20
        (small_disk / "0" / "samples.partial").mkdir(parents=True)
        (small_disk / "0" / "samples.partial" / "job.json").write_text("{}")
    hosts = two_hosts(tiny_run, small_disk, f"--num_per_class={images // 10}", "--batch=4")
    try:
        if failure == "full disk":
            file, deadline = small_disk / "0" / "samples.partial" / "images.uint8", time.monotonic() + 300
            while not (file.exists() and file.stat().st_size) and time.monotonic() < deadline:
                assert hosts[0].poll() is None, hosts[0].communicate()[1][-2000:]
                time.sleep(0.01)
            with contextlib.suppress(OSError), open(small_disk / "filler", "wb", buffering=0) as filler:
                while True:
                    filler.write(bytes(4096))
        stderr = hosts[0].communicate(timeout=400)[1]
        ended = time.monotonic()
        hosts[1].communicate(timeout=60)
        print(f"process 1 ended {time.monotonic() - ended:.1f} s after process 0")
    finally:
        for host in hosts:
            host.kill()
    assert [host.returncode != 0 for host in hosts] == [True, True]
    assert re.search(message, stderr) and "Traceback" not in stderr, stderr[-2000:]


def test_unfinished_samples_of_another_call_are_not_mixed(tiny_run, tmp_path):
    killed_after(tiny_run, tmp_path, 10)
    flags = (f"--workdir={tiny_run}", f"--out={tmp_path}", f"--num_per_class={COUNT // 10}")
    done = command("sample.py", *flags, "--seed=5")
    assert done.returncode != 0 and "seed: 0 there, 5 now" in done.stderr
    assert "Traceback" not in done.stderr
    # The same codes with another decoder, as a tokenizer that was trained on has, make other images.
    done = command("-c", OTHER_DECODER, *flags)
    assert done.returncode != 0 and "\n  tokenizer: weights " in done.stderr and "seed" not in done.stderr


def test_classes_and_controls_reach_the_program(tiny_run, tmp_path):
    flags = ("--classes=2-3,none", "--num_per_class=2", "--guidance=0,1,2", "--top_k=4", "--upto=2")
    done = command("sample.py", f"--workdir={tiny_run}", f"--out={tmp_path}", *flags, "--smooth=true,0,0")
    assert done.returncode == 0, done.stderr[-2000:]
    assert "guidance (0.0, 1.0, 2.0)" in done.stdout and "smooth (True, False, False)" in done.stdout
    with np.load(tmp_path / "samples.npz") as samples:
        assert samples["arr_1"].tolist() == [2, 3, 10, 2, 3, 10]
    assert Image.open(tmp_path / "scales.png").size == (2 * 50 + 2, 3 * 50 + 2)  # two maps, three classes


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (("--top_k=17",), "top_k must be at most the 16 codes of the codebook, 0 for all; got 17"),
        (("--guidance=1,2",), "guidance must be one value or one for each of the 3 scales"),
        (("--guidance=high",), "--guidance=high: could not convert string to float"),
        (("--classes=0-99",), "--classes=0-99: labels must be in 0 .. 10"),
        (("--classes=3-1",), "--classes=3-1: labels must be int"),
        (("--coordinator=localhost:1",), "several hosts need --coordinator, --num_processes and"),
        (("--smooth=maybe",), "must be true or false, got 'maybe'"),
    ],
)
def test_wrong_controls_are_named(tiny_run, tmp_path, flags, message):
    done = command("sample.py", f"--workdir={tiny_run}", f"--out={tmp_path}/new", *flags)
    assert done.returncode != 0 and message in done.stderr + done.stdout
    assert not (tmp_path / "new").exists()


def test_flags_that_cannot_be_are_refused_before_anything_is_loaded():
    done = command("-c", OUT_FOLDER)
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout.splitlines() == [
        "give either --labels, one per image, or --classes; got both",
        "give either --labels, one per image, or --num_per_class; got both",
        "--workdir=gs://bucket/run is remote, but samples are written to local files: give --out=DIR, a "
        "folder on this machine, too",
        "--out=gs://bucket/out: must be a local path. Copy it to this machine, or mount the bucket (gcsfuse "
        "for gs://) and give the path of the mount.",
        "flag --seed=4294967296: 4294967296 is not an integer in the range [0, 4294967295]",
        "flag --seed=-1: -1 is not an integer in the range [0, 4294967295]",
    ]


def test_editing_files(tiny_run, tmp_path):
    rng = np.random.default_rng(0)
    picture = rng.integers(0, 256, (16, 24, 3)).astype(np.uint8)
    Image.fromarray(picture).save(tmp_path / "wide.png")
    flags = (f"--workdir={tiny_run}", f"--image={tmp_path}/wide.png", f"--out={tmp_path}/edit", "--num=2")
    edit = ("-m", "var_jax.tools.edit", *flags)
    done = command(*edit, "--box=0,8,24,16", "--label=3", "--paste_back")
    assert done.returncode == 0, done.stderr[-2000:]
    assert "24 x 16, cropped to a square and resized to 8 x 8" in done.stdout and "50% of them" in done.stdout
    after = [np.asarray(Image.open(tmp_path / "edit" / f"edit_00{i}.png")).astype(int) for i in (0, 1)]
    cropped = Image.fromarray(picture).crop((4, 0, 20, 16)).resize((8, 8), Image.Resampling.LANCZOS)
    for image in after:
        np.testing.assert_array_equal(image[:4], np.asarray(cropped)[:4])  # no pixel outside the mask changes
    assert (after[0] != after[1]).any()
    assert Image.open(tmp_path / "edit" / "edit.png").size == (4 * 50 + 2, 52)  # before, mask, after
    for wrong, message in (
        (("--box=0,8,24,17",), "must be left,top,right,bottom inside the image, 24 x 16"),
        ((f"--mask={REPOSITORY}/README.md",), "README.md is not an image"),
        ((), "give either --mask=FILE or --box"),
    ):
        done = command(*edit, *wrong)
        assert done.returncode != 0 and message in done.stderr + done.stdout


def test_variations_of_a_drawn_image(tiny_run, tmp_path):
    flags = (f"--workdir={tiny_run}", f"--out={tmp_path}", "--label=1", "--towards=7", "--num=3")
    done = command("-m", "var_jax.tools.vary", *flags)
    assert done.returncode == 0, done.stderr[-2000:]
    picture = np.asarray(Image.open(tmp_path / "vary.png")).astype(int)
    assert picture.shape == (3 * 50 + 2, 4 * 50 + 2, 3)  # a row per scale: the image and three variations
    rows = picture[2:].reshape(3, 50, -1, 3)[:, :48, 2:50]
    np.testing.assert_array_equal(rows[0], rows[2])  # every row begins with the image
