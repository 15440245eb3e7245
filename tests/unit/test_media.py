"""Which frame is shown, when it was, and how large: against plain decoding of real files and hand-made arithmetic."""

from __future__ import annotations

import json
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from rft.data.budget import Budget
from rft.data.media import probe, read, view
from rft.errors import DataError
from rft.families import FAMILIES
from rft.types import Media
from tests import videos

QWEN25, QWEN3 = FAMILIES["qwen2_5_vl"], FAMILIES["qwen3_vl"]
TINY = {"min_pixels": 56 * 56, "max_pixels": 56 * 84}
NTSC = Fraction(30000, 1001)
OPEN = {"preset": "veryfast", "x264-params": "open-gop=1:keyint=20:bframes=3:scenecut=0"}
# name: how the file is made, the budget, the number of frames by hand, the first target (None: evenly from end to end)
CASES = {
    "25 fps, 10 s": ({"seconds": videos.spaced(25, 250)}, {}, 20, 0),
    "29.97 fps": ({"seconds": videos.spaced(NTSC, 300)}, {}, 20, 0),  # 10.01 s x 2 = 20.02
    "8 fps at 1": ({"seconds": videos.spaced(8, 160)}, {"fps": 1.0}, 20, 0),
    "25 fps at 3": ({"seconds": videos.spaced(25, 100)}, {"fps": 3.0}, 12, 0),
    "25 fps at 7": ({"seconds": videos.spaced(25, 100)}, {"fps": 7.0}, 28, 0),
    "5 fps at 0.3": ({"seconds": videos.spaced(5, 200)}, {"fps": 0.3}, 12, 0),
    "floored to even": ({"seconds": videos.spaced(10, 37)}, {}, 6, 0),  # 3.7 s x 2 = 7.4 -> 7 -> 6
    "too short for fps": ({"seconds": videos.spaced(25, 25)}, {}, 4, None),  # 2 -> min_frames
    "too long for fps": ({"seconds": videos.spaced(25, 250)}, {"max_frames": 17}, 16, None),
    "denser than the file": ({"seconds": videos.spaced(5, 21)}, {"fps": 8.0}, 20, None),  # 33.6 -> 21 -> 20
    "nframes": ({"seconds": videos.spaced(25, 250)}, {"nframes": 6}, 6, None),
    "nframes of a short file": ({"seconds": videos.spaced(25, 9)}, {"nframes": 16}, 8, None),
    "variable": ({"seconds": videos.variable()}, {}, 58, 0),  # the file ends 0.04 s after 29.8: 29.84 x 2 = 59.68
    "variable, capped": ({"seconds": videos.variable()}, {"max_frames": 20}, 20, None),
    "variable, in milliseconds": ({"seconds": videos.variable(), "clock": Fraction(1, 1000), "ext": "mkv"}, {}, 58, 0),
    "container starts at 5 s": ({"seconds": videos.spaced(25, 100, start=5), "ext": "ts"}, {}, 8, 0),
    "picture starts after the sound": (
        {"seconds": videos.spaced(25, 100, start=0.4), "tone": True}, {}, 8, Fraction(2, 5)
    ),
    "window": ({"seconds": videos.spaced(25, 250)}, {"video_start": 2.3, "video_end": 6.1}, 6, Fraction(23, 10)),
    "dense window": (
        {"seconds": videos.spaced(25, 250)}, {"video_start": 7.3, "video_end": 8.2, "nframes": 16}, 16, None
    ),
    "window past the end": ({"seconds": videos.spaced(25, 250)}, {"video_start": 8.0, "video_end": 99.0}, 4, 8),
    "open groups": ({"seconds": videos.spaced(25, 250), "options": OPEN}, {"fps": 5.0}, 50, 0),
    "open groups, window": (
        {"seconds": videos.spaced(25, 250), "options": OPEN, "ext": "ts"},
        {"video_start": 3.07, "video_end": 3.17, "nframes": 2}, 2, None,  # both lean on the key frame before and after
    ),
    "packets without times": (
        {"seconds": videos.spaced(25, 100), "ext": "avi", "codec": "mpeg4", "clock": Fraction(1, 25), "options": {}},
        {}, 8, 0,
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", CASES)
def test_frames_are_those_nearest_in_presentation_time(name: str, tmp_path: Path) -> None:
    made, budget, num, start = CASES[name]
    made = dict(made)
    path = videos.write_video(tmp_path / f"a.{made.pop('ext', 'mp4')}", made.pop("seconds"), **made)
    truth = videos.decoded(path)  # by decoding everything: what the tested code never does
    shown = view(video(path), 0, family=QWEN25, budget=Budget(**TINY, **budget))

    low, high = (Fraction(budget.get(k, d)).limit_denominator(100) for k, d in (("video_start", 0), ("video_end", 99)))
    inside = [i for i, (second, _) in enumerate(truth) if low <= second <= high]
    first, last = truth[inside[0]][0], truth[inside[-1]][0]
    step = 1 / Fraction(budget.get("fps", 2)).limit_denominator(100)
    targets = [first + (last - first) * k / (num - 1) if start is None else start + k * step for k in range(num)]
    nearest = [min(inside, key=lambda i: (abs(truth[i][0] - t), i)) for t in targets]

    assert shown.frames == tuple(nearest)
    assert shown.seconds == pytest.approx([float(truth[i][0]) for i in nearest], abs=1e-3)
    assert [videos.mark(pixels) for pixels in read(shown)] == [truth[i][1] for i in nearest]


def test_probe_tells_every_second_to_a_millisecond(tmp_path: Path) -> None:
    for name, seconds in (("a", videos.variable()), ("b", videos.spaced(NTSC, 100)), ("c", videos.spaced(7, 50))):
        found = probe(str(videos.write_video(tmp_path / f"{name}.mp4", seconds)))
        assert found.seconds == pytest.approx([float(s) for s in seconds], abs=1e-3)
        assert found.size == (48, 96)
    assert found.duration == pytest.approx(50 / 7, abs=1e-3)  # to the end of the last frame


def test_a_variable_rate_is_not_index_over_fps(tmp_path: Path) -> None:
    path = videos.write_video(tmp_path / "a.mp4", videos.variable())
    shown = view(video(path), 0, family=QWEN25, budget=Budget(**TINY))
    # At 20 s the file is 250 + 10 x 5 = 300 frames in; 350 frames in 29.84 s would put frame 300 at 25.6 s.
    assert shown.frames[40] == 300 and shown.seconds[40] == pytest.approx(20.0, abs=1e-3)


def test_no_frame_is_shown_twice_where_the_file_has_enough(tmp_path: Path) -> None:
    path = videos.write_video(tmp_path / "a.mp4", videos.variable())
    shown = view(video(path), 0, family=QWEN25, budget=Budget(fps=10.0, **TINY))
    assert len(shown.frames) == len(set(shown.frames)) == 298  # 29.84 x 10, twice what the slow part has
    assert list(shown.frames) == sorted(shown.frames) and shown.frames[-1] == 349


def test_a_rows_own_budget_goes_first(tmp_path: Path) -> None:
    path = videos.write_video(tmp_path / "a.mp4", videos.spaced(25, 250))
    media = Media(kind="video", source=str(path), budget={"nframes": 6, "fps": None, "max_pixels": 3200})
    shown = view(media, 0, family=QWEN25, budget=Budget(fps=1.0, **TINY))
    assert (len(shown.frames), shown.size) == (6, (28, 56))


def test_a_window_between_two_frames_takes_the_nearest_pair(tmp_path: Path) -> None:
    path = videos.write_video(tmp_path / "a.mp4", videos.spaced(5, 50))
    budget = Budget(nframes=16, video_start=4.05, video_end=4.15, **TINY)
    assert view(video(path), 0, family=QWEN25, budget=budget).seconds == (4.0, 4.2)


def test_a_rewritten_file_is_probed_again(tmp_path: Path) -> None:
    path = videos.write_video(tmp_path / "a.mp4", videos.spaced(25, 50))
    assert len(probe(str(path)).seconds) == 50
    videos.write_video(path, videos.spaced(25, 60))
    assert len(probe(str(path)).seconds) == 60


def test_listed_frames_are_a_video(tmp_path: Path) -> None:
    seconds = (0.0, 0.5, 1.0, 1.7, 2.0, 2.5, 3.0, 3.5)
    paths = []
    for number in range(8):
        Image.fromarray(videos.painted(number)).save(tmp_path / f"{number}.png")
        paths.append(str(tmp_path / f"{number}.png"))
    media = Media(kind="frames", source=tuple(paths), seconds=seconds)
    shown = view(media, 3, family=QWEN3, budget=Budget(fps=1.0, min_pixels=32 * 32, max_pixels=64 * 96))
    assert (shown.media, shown.kind, shown.duration) == (3, "video", 4.0)
    assert shown.frames == (0, 2, 4, 6) and shown.seconds == (0.0, 1.0, 2.0, 3.0)
    assert shown.pair_seconds == (0.5, 2.5)  # printed clock: the mean of the pair
    assert [videos.mark(pixels) for pixels in read(shown)] == [0, 2, 4, 6]


def test_pixels_follow_the_published_budget(tmp_path: Path) -> None:
    golden = json.loads((Path(__file__).parents[1] / "golden" / "tempsamp_vectors.json").read_text())["video_budget"]
    Image.new("RGB", (1920, 1080)).save(tmp_path / "a.png")
    sizes = []
    for row in golden["rows"]:
        num, cap = row["frames"], row["max_pixels_per_frame"]
        media = Media(kind="frames", source=(str(tmp_path / "a.png"),) * num, seconds=tuple(k / 2 for k in range(num)))
        budget = Budget(total_pixels=3584 * 28 * 28, min_pixels=16 * 28 * 28)
        shown = view(media, 0, family=QWEN25, budget=budget)
        assert len(shown.frames) == num
        assert shown.size[0] * shown.size[1] <= cap
        sizes.append((shown.size, shown.tokens))
    # 20 frames: sqrt(1080 x 1920 / 280985.6) = 2.7166; 1080 / 2.7166 = 397.6 -> 14 x 28, 1920 / 2.7166 = 706.8 -> 700
    assert sizes[0] == ((392, 700), 10 * 14 * 25)
    # 480 frames: 2809856 / 240 = 11707.7 < 1.05 x 12544 = 13171; sqrt(2073600 / 13171) = 12.547 -> 86.1 x 153.0
    assert sizes[3] == ((84, 140), 240 * 3 * 5)


def test_default_least_pixels_enlarge_and_give_way(tmp_path: Path) -> None:
    path = videos.write_video(tmp_path / "a.mp4", videos.spaced(25, 50))
    # 128 tokens: sqrt(128 x 784 / (48 x 96)) = 4.667; 48 x 4.667 = 224 = 8 x 28, 96 x 4.667 = 448 = 16 x 28
    assert view(video(path), 0, family=QWEN25, budget=Budget()).size == (224, 448)
    assert view(video(path), 0, family=QWEN25, budget=Budget(max_pixels=1600)).size == (28, 56)


def test_max_tokens_takes_frames_first_then_pixels(tmp_path: Path) -> None:
    path = videos.write_video(tmp_path / "a.mp4", videos.spaced(25, 250), size=(112, 112))
    budget = Budget(min_pixels=4 * 784, max_pixels=16 * 784)

    def shown(limit: int | None):
        return view(video(path), 0, family=QWEN25, budget=budget, max_tokens=limit)

    assert (len(shown(None).frames), shown(None).tokens) == (20, 160)  # 10 pairs x 4 x 4
    assert shown(160) == shown(None)
    assert (len(shown(100).frames), shown(100).size, shown(100).tokens) == (12, (112, 112), 96)  # 100 // 16 = 6 pairs
    assert shown(100).seconds[-1] == pytest.approx(9.96)  # evenly to the end, not cut
    assert (len(shown(40).frames), shown(40).tokens) == (4, 32)
    # Two pairs stay: 20 / 2 = 10 tokens; sqrt(12544 / 7840) = 1.265; 112 / 1.265 = 88.5 -> 84 = 3 x 28
    assert (len(shown(20).frames), shown(20).size, shown(20).tokens) == (4, (84, 84), 18)
    with pytest.raises(DataError, match=r"20 x \(112, 112\) is 160.*min_pixels=3136 4 x \(56, 56\) is 8.*max_tokens is 7"):
        shown(7)


def test_images_are_upright_on_white_and_cropped(tmp_path: Path) -> None:
    clear = Image.new("RGBA", (56, 28), (255, 0, 0, 0))
    clear.paste((0, 0, 255, 255), (28, 0, 56, 28))
    clear.save(tmp_path / "clear.png")
    shown = view(image(tmp_path / "clear.png"), 0, family=QWEN25, budget=Budget(min_pixels=784))
    assert (shown.size, shown.grid, shown.tokens, shown.seconds, shown.frames) == ((28, 56), (1, 2, 4), 2, (), (0,))
    pixels = read(shown)
    assert pixels.shape == (1, 28, 56, 3)
    assert pixels[0, 0, 0].tolist() == [255, 255, 255] and pixels[0, 0, -1].tolist() == [0, 0, 255]

    right = view(image(tmp_path / "clear.png"), 0, family=QWEN25, budget=Budget(min_pixels=784), crop=(27.5, -3, 99, 28))
    assert (right.crop, right.size) == ((27, 0, 56, 28), (28, 28))  # outward to whole pixels, clipped
    assert read(right)[0, 14, 20].tolist() == [0, 0, 255]

    exif = Image.Exif()
    exif[0x0112] = 6  # lies on its side
    Image.new("RGB", (56, 28)).save(tmp_path / "side.jpg", exif=exif)
    turned = view(image(tmp_path / "side.jpg"), 0, family=QWEN25, budget=Budget(min_pixels=784))
    assert turned.original == turned.size == (56, 28) and read(turned).shape == (1, 56, 28, 3)

    with pytest.raises(DataError, match="misses"):
        view(image(tmp_path / "clear.png"), 0, family=QWEN25, budget=Budget(), crop=(60, 0, 70, 10))


def test_a_crop_of_a_video_comes_before_its_resize(tmp_path: Path) -> None:
    path = videos.write_video(tmp_path / "a.mp4", videos.spaced(25, 50))
    left = view(video(path), 0, family=QWEN25, budget=Budget(fps=4.0, **TINY), crop=(0, 0, 48, 48))
    assert left.original == (48, 96) and left.size == (56, 56)
    halves = [sum(int(p[:, int((b + 0.5) * 56 / 6)].mean() > 128) << b for b in range(6)) for p in read(left)]
    assert halves == list(left.frames)  # the left half holds the six low bits


def test_pixels_are_resized_as_the_library_does(tmp_path: Path) -> None:
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (100, 150, 3), np.uint8)).save(tmp_path / "a.png")
    shown = view(image(tmp_path / "a.png"), 0, family=QWEN25, budget=Budget(max_pixels=56 * 84))
    expected = np.array(Image.open(tmp_path / "a.png").resize((84, 56)))  # fetch_image of qwen-vl-utils: Pillow, bicubic
    assert shown.size == (56, 84)
    np.testing.assert_allclose(read(shown)[0].astype(int), expected.astype(int), atol=1)


def write_truncated(path: Path, index_first: bool) -> Path:
    muxer = {"movflags": "faststart"} if index_first else {}
    data = videos.write_video(path, videos.spaced(25, 250), muxer=muxer).read_bytes()
    path.write_bytes(data[: len(data) // 2])
    return path


BAD = {
    "there is none": (lambda p: p, "No such file"),
    "a folder": (lambda p: p.mkdir() or p, "cannot be read"),
    "text": (lambda p: p.write_text("once upon a time " * 50) and p, "cannot be read as a video"),
    "cut before its index": (lambda p: write_truncated(p, False), "cannot be read as a video"),
    "cut after its index": (lambda p: write_truncated(p, True), r"truncated: \d+ of \d+ bytes"),
    "sound alone": (videos.write_sound, r"no video stream \(audio tracks\)"),
    "no frame": (lambda p: videos.write_empty(p.with_suffix(".avi")), "not one frame"),
    "one frame": (lambda p: videos.write_video(p, videos.spaced(25, 1)), "has 1 frame"),
    "no clock": (lambda p: videos.write_video(p.with_suffix(".h264"), videos.spaced(25, 9)), "no presentation times"),
    "window beyond": (lambda p: videos.write_video(p, videos.spaced(25, 50)), "shows nothing from 50.000 to 2.000 s"),
}


@pytest.mark.parametrize("name", BAD)
def test_an_unusable_video_is_named(name: str, tmp_path: Path) -> None:
    make, what = BAD[name]
    path = make(tmp_path / "bad.mp4")
    with pytest.raises(DataError, match=what) as caught:
        view(video(path), 0, family=QWEN25, budget=Budget(video_start=50.0 if name == "window beyond" else None))
    assert caught.value.where == str(path) and caught.value.do


def test_a_damaged_frame_is_an_error_and_the_rest_is_not(tmp_path: Path) -> None:
    path = videos.write_video(tmp_path / "a.mp4", videos.spaced(25, 250), muxer={"movflags": "faststart"})
    data = bytearray(path.read_bytes())
    data[-2500:] = bytes(2500)
    path.write_bytes(data)
    early = view(video(path), 0, family=QWEN25, budget=Budget(video_end=4.0, **TINY))
    assert [videos.mark(pixels) for pixels in read(early)] == list(early.frames)
    with pytest.raises(DataError, match=r"a\.mp4"):
        read(view(video(path), 0, family=QWEN25, budget=Budget(fps=25.0, **TINY)))


def test_an_unreadable_image_is_named(tmp_path: Path) -> None:
    (tmp_path / "a.png").write_bytes(b"\x89PNG\r\n\x1a\n cut")
    for path in (tmp_path / "a.png", tmp_path / "none.png"):
        with pytest.raises(DataError, match="cannot be"):
            view(image(path), 0, family=QWEN25, budget=Budget())
    whole = tmp_path / "b.png"
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (56, 56, 3), np.uint8)).save(whole)
    shown = view(image(whole), 0, family=QWEN25, budget=Budget())
    whole.write_bytes(whole.read_bytes()[:4000])
    with pytest.raises(DataError, match=r"b\.png: cannot be read as an image"):
        read(shown)


def test_a_row_changes_its_own_keys_only() -> None:
    base = Budget(max_pixels=9000)
    assert (base.fps, base.merged({}), base.merged({"fps": None})) == (2.0, base, base)
    assert base.merged({"nframes": 8}) == Budget(nframes=8, max_pixels=9000)
    assert Budget(nframes=8).merged({"fps": 1.0}) == Budget(fps=1.0)
    with pytest.raises(DataError, match="did you mean max_pixels"):
        base.merged({"max_pixel": 3})
    with pytest.raises(DataError, match="both set"):
        base.merged({"fps": 1.0, "nframes": 8})
    with pytest.raises(DataError, match="min_pixels=10000 leaves nothing below max_pixels=9000"):
        base.merged({"min_pixels": 10000})
    with pytest.raises(DataError, match="fps=0 is not positive"):
        Budget(fps=0)


def video(path: Path) -> Media:
    return Media(kind="video", source=str(path))


def image(path: Path) -> Media:
    return Media(kind="image", source=str(path))
