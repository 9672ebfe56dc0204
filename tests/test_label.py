import base64
import csv
import io
import itertools
import re
import signal
import time

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from PIL.PngImagePlugin import PngInfo
from sklearn.metrics import cohen_kappa_score

from moe_artifacts.audit.labels import read_labels
from moe_artifacts.errors import InputError
from moe_artifacts.guard.run_folder import read_run
from moe_artifacts.label import (
    Outcome,
    Table,
    Terminal,
    agreement,
    find_images,
    label_images,
    rater_tables,
    read_verdicts,
    table_path,
)
from moe_artifacts.label.pictures import PROTOCOLS, fitted, protocol_of, read_picture
from tests.runs import made_up_run
from tests.typist import at_a_terminal

ASKS = "q quit"  # the last thing on the screen before a key is read


class Scripted:
    """A rater that presses the given keys, and remembers what the table said at each."""

    def __init__(self, keys, table=None):
        self.keys = iter(keys)
        self.table = table
        self.shown, self.said, self.stored = [], [], []

    def show(self, image, heading):
        self.shown.append((image.file, heading))

    def say(self, text):
        self.said.append(text)

    def key(self, known):
        if self.table is not None and self.table.path.exists():
            self.stored.append(self.table.path.read_text())
        key = next(self.keys, "q")
        assert key in known
        return key


@pytest.fixture
def folder(tmp_path):
    """Four pictures in two folders, and other things."""
    (tmp_path / "images" / "more").mkdir(parents=True)
    for number, name in enumerate(["a.png", "b.JPG", "more/c.png", "more/d.webp"]):
        Image.new("RGB", (6, 4), (60 * number, 0, 0)).save(tmp_path / "images" / name)
    for name in ("notes.txt", ".hidden.png"):
        (tmp_path / "images" / name).write_text("")
    return tmp_path / "images"


def rows(path):
    with open(path, encoding="utf-8", newline="") as stream:
        return {row["file"]: row["artifact"] for row in csv.DictReader(stream)}


def session(folder, keys, rater=None, **options):
    images = find_images(folder)
    table = Table(table_path(folder, rater), images)
    scripted = Scripted(keys, table)
    return label_images(images, table, scripted, **options), scripted


# --- images


def test_every_picture_is_found_once_and_in_the_same_order_always(folder):
    files = [image.file for image in find_images(folder)]
    assert sorted(files) == ["a.png", "b.JPG", "more/c.png", "more/d.webp"]
    assert files == [image.file for image in find_images(folder)] != sorted(files)
    (folder / "e.png").write_bytes((folder / "a.png").read_bytes())
    assert [image.file for image in find_images(folder) if image.file != "e.png"] == files  # a new one changes nothing


def test_of_a_run_the_finished_images_count_and_their_paths_are_hidden(tmp_path):
    run = made_up_run(tmp_path / "runs" / "a", {"a bag": "kuacr", "a coat": "kkku"})
    (run / "images" / "p00099-a0000.png").write_bytes(b"of a wave that was killed")
    Image.new("RGB", (2, 2)).save(tmp_path / "runs" / "plain.png")
    images = {image.file: image for image in find_images(tmp_path / "runs")}
    finished = {f"a/{attempt.file}" for attempt in read_run(run).attempts if attempt.file is not None}
    assert images.keys() == finished | {"plain.png"} and len(finished) == 7
    assert all(image.hide_path == (file != "plain.png") for file, image in images.items())
    assert [file for file, image in images.items() if "audited" in file and image.kept] == []


def test_only_so_many_kept_images_and_all_audited_ones(tmp_path):
    run = made_up_run(tmp_path / "run", {"a bag": "k" * 30 + "u" * 5})
    everything = [image.file for image in find_images(run)]
    for count in (0, 7, 99):
        files = [image.file for image in find_images(run, kept=count)]
        assert sum(file.startswith("audited/") for file in files) == 5
        assert len(files) == 5 + min(count, 30)
        assert files == [file for file in everything if file in set(files)]  # no new order
    few = {image.file for image in find_images(run, kept=7)}
    assert few <= {image.file for image in find_images(run, kept=8)}  # whoever wants more has done the first already


def test_an_image_that_the_safety_checker_blacked_out_is_not_asked_about(tmp_path):
    run = made_up_run(tmp_path / "run", {"a bag": "kk"})
    wave = run / "waves" / "000000.json"
    wave.write_text(wave.read_text().replace('"nsfw_content_detected": null', '"nsfw_content_detected": true', 1))
    assert [image.file for image in find_images(run)] == ["images/p00000-a0001.png"]


def test_folders_without_images_are_refused(folder, tmp_path):
    (tmp_path / "empty").mkdir()
    for arguments, message in [
        ((tmp_path / "nothing",), "is not a folder"),
        ((tmp_path / "empty",), "holds no finished image"),
        ((folder, 3), "holds no run"),
        ((folder, -1), "kept must be at least 0, got -1"),
    ]:
        with pytest.raises(InputError, match=message):
            find_images(*arguments)
    (folder / b"\xff.png".decode(errors="surrogateescape")).write_bytes(b"")
    with pytest.raises(InputError, match="is not UTF-8"):
        find_images(folder)


# --- sessions


def test_keys_become_rows_and_each_is_stored_before_the_next_image(folder):
    order = [image.file for image in find_images(folder)]
    outcome, rater = session(folder, "acsa")
    assert rows(folder / "labels.csv") == dict(zip(order, ["1", "0", "", "1"], strict=True))
    assert outcome == Outcome(images=4, artifact=2, clean=1, skipped=1)
    assert str(outcome) == "4 images: 2 with artifacts, 1 clean, 1 skipped, 0 to do"
    assert [len(text.splitlines()) for text in rater.stored] == [2, 3, 4, 5]  # a header and as many rows as keys before
    assert [heading for _, heading in rater.shown] == ["1 of 4", "2 of 4", "3 of 4", "4 of 4"]
    assert rater.said[-1] == "that was the last image: u undo, q quit"
    assert [path.name for path in folder.glob("*labels*")] == ["labels.csv"]


@settings(max_examples=25)  # each writes a file per key, which is synced to disk
@given(st.lists(st.sampled_from("acus"), max_size=15), st.data())
def test_any_keys_in_any_number_of_sessions_give_what_a_list_gives(tmp_path_factory, keys, data):
    folder = tmp_path_factory.mktemp("images")
    for number in range(5):
        Image.new("RGB", (1, 1)).save(folder / f"{number}.png")
    order = [image.file for image in find_images(folder)]
    expected: list[str] = []
    while keys:
        part = keys[: data.draw(st.integers(1, len(keys)))]
        answers: list[str] = []
        pressed = []
        for key in part:
            if key == "u":
                answers = answers[:-1]
            elif len(expected) + len(answers) < len(order):
                answers.append({"a": "1", "c": "0", "s": ""}[key])
            else:
                continue  # past the end only undo and quit are read
            pressed.append(key)
        if len(expected) < len(order):  # nothing is asked any more
            expected += answers
        session(folder, pressed)
        found = rows(folder / "labels.csv") if (folder / "labels.csv").exists() else {}
        assert found == dict(zip(order, expected, strict=False))
        keys = keys[len(part) :]


def test_a_second_session_asks_only_what_is_left(folder):
    order = [image.file for image in find_images(folder)]
    session(folder, "as")
    _, rater = session(folder, "cq")
    assert rater.shown == [(order[2], "3 of 4"), (order[3], "4 of 4")]
    session(folder, "a")
    outcome, rater = session(folder, "")
    assert rater.shown == [] and rater.said == [] and outcome.images == 4  # not even the question whether to undo


def test_redo_asks_about_all_and_keeps_what_is_not_answered(folder):
    order = [image.file for image in find_images(folder)]
    session(folder, "acs")
    _, rater = session(folder, "csaq", redo=True)
    assert rows(folder / "labels.csv") == dict(zip(order, ["0", "0", "1"], strict=False))  # s left the second alone
    headings = [heading for _, heading in rater.shown]
    assert headings == ["1 of 4, so far artifacts", "2 of 4, so far clean", "3 of 4, so far skipped", "4 of 4"]


def test_undo_restores_what_the_table_said(folder):
    order = [image.file for image in find_images(folder)]
    session(folder, "ac")
    _, rater = session(folder, "cauuu", redo=True)
    assert rows(folder / "labels.csv") == dict(zip(order, ["1", "0"], strict=False))
    assert "nothing to undo" in rater.said
    session(folder, "aauuq")
    assert rows(folder / "labels.csv") == dict(zip(order, ["1", "0"], strict=False))  # rows of its own are gone


# --- the table


def test_the_audit_reads_it(tmp_path):
    runs = [made_up_run(tmp_path / name, {"a bag": "kuuk"}, seed=k) for k, name in enumerate("ab")]
    answers = dict(zip((image.file for image in find_images(tmp_path)), "acsacsac", strict=True))
    session(tmp_path, answers.values())
    found = read_labels(tmp_path / "labels.csv", [read_run(run) for run in runs]).artifact
    assert {f"{'ab'[place]}/{file}": label for (place, file), label in found.items()} == {
        file: int(key == "a") for file, key in answers.items() if key != "s"
    }
    session(runs[0], "acac")
    assert len(read_labels(runs[0] / "labels.csv", [read_run(runs[0])]).artifact) == 4


def test_other_rows_and_columns_stay_as_they_are(folder):
    path = folder / "labels.csv"
    path.write_bytes(
        '\ufefffile,why,artifact\r\n"gone, long ago.png",blurred,1\r\nmore/c.png,"two\nlines",0.0\r\n'.encode()
    )
    order = [image.file for image in find_images(folder) if image.file != "more/c.png"]
    session(folder, "ac")
    expected = (
        f'file,why,artifact\n"gone, long ago.png",blurred,1\nmore/c.png,"two\nlines",0\n{order[0]},,1\n{order[1]},,0\n'
    )
    assert path.read_text() == expected


def test_rows_may_name_images_by_any_path_the_audit_takes(folder, monkeypatch):
    monkeypatch.chdir(folder.parent)
    (folder / "labels.csv").write_text(f"file,artifact\nd.webp,1\nimages/a.png,0\n{folder / 'b.JPG'},1\n")
    images = find_images("images")
    assert read_verdicts("images/labels.csv", images) == {"more/d.webp": 1, "a.png": 0, "b.JPG": 1}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("name,artifact\n", r"lacks the columns \['file'\]"),
        ("", "lacks the columns"),
        ("file,artifact\na.png,yes\n", "artifact of 'a.png' must be 1"),
        ("file,artifact\na.png,1\nmore/../a.png,1\n", "is there twice"),
        ("file,artifact\na.png,1,0\n", "line 2 has more values"),
        ("file,artifact\nc.png,1\n", "could be any of 2 images"),
        ("file,artifact\n\udcff,1\n", "cannot read"),
    ],
)
def test_tables_that_are_none_are_refused(folder, monkeypatch, text, message):
    monkeypatch.chdir(folder)
    Image.new("RGB", (1, 1)).save(folder / "c.png")
    (folder / "c.png").rename(folder / "more" / "again")
    (folder / "again").mkdir()
    (folder / "more" / "again").rename(folder / "again" / "c.png")
    path = folder / "labels.csv"
    path.write_text(text, encoding="utf-8", errors="surrogateescape")
    with pytest.raises(InputError, match=message):
        Table(path, find_images(folder))
    assert path.read_text(encoding="utf-8", errors="surrogateescape") == text


def test_nobody_overwrites_the_verdicts_of_another(folder):
    images = find_images(folder)
    mine, yours = (Table(folder / "labels.csv", images) for _ in range(2))
    yours.put(images[0], "1")
    with pytest.raises(InputError, match="was changed by someone else"):
        mine.put(images[1], "0")
    assert rows(folder / "labels.csv") == {images[0].file: "1"}


def test_a_full_disk_leaves_the_table_as_it_was(folder, monkeypatch):
    session(folder, "a")
    before = (folder / "labels.csv").read_bytes()

    def no_space(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("pathlib.Path.write_bytes", no_space)
    with pytest.raises(OSError, match="No space left"):
        session(folder, "c")
    assert (folder / "labels.csv").read_bytes() == before and len(list(folder.glob("*labels*"))) == 1


@pytest.mark.parametrize("name", ["", "../ann", "ann b", "a/b"])
def test_raters_have_plain_names(name):
    with pytest.raises(InputError, match="rater must be a name"):
        table_path("run", name)


# --- agreement


@given(st.lists(st.tuples(st.integers(0, 1), st.integers(0, 1)), min_size=1, max_size=40))
def test_kappa_is_that_of_scikit_learn(pairs):
    first, second = ({str(k): pair[rater] for k, pair in enumerate(pairs)} for rater in (0, 1))
    found = agreement(first | {"mine": 1}, second | {"yours": 0})
    assert found.images == len(pairs)
    assert found.share == pytest.approx(np.mean([a == b for a, b in pairs]))
    if len(set(itertools.chain.from_iterable(pairs))) == 1:
        assert found.kappa is None and "not defined" in str(found)
    else:
        assert found.kappa == pytest.approx(cohen_kappa_score(*zip(*pairs, strict=True)), abs=1e-12)
        assert found.kappa == pytest.approx(agreement(second, first).kappa, abs=1e-12)


def test_agreement_of_two_raters_of_a_folder(folder):
    session(folder, "aacs", rater="ann")
    session(folder, "aca", rater="ben")
    images = find_images(folder)
    tables = rater_tables(folder)
    assert [path.name for path in tables] == ["labels-ann.csv", "labels-ben.csv"]
    found = agreement(*(read_verdicts(path, images) for path in tables))
    assert (found.both_artifact, found.only_first, found.only_second, found.both_clean) == (1, 1, 1, 0)
    assert str(found).startswith("agree on 33.3 % of 3 images, Cohen's kappa -0.50")
    with pytest.raises(InputError, match="no image in common"):
        agreement({"a": 1}, {"b": 1})
    with pytest.raises(InputError, match="there is no table"):
        read_verdicts(folder / "labels-cem.csv", images)


# --- pictures


def noise(width, height):
    return Image.fromarray(np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8))


def pixels(data):
    return np.asarray(Image.open(io.BytesIO(base64.b64decode(data))))


def test_kitty_gets_the_picture_in_parts():
    picture = noise(70, 50)
    parts = re.findall(r"\x1b_G([^;]*);([^\x1b]*)\x1b\\", PROTOCOLS["kitty"](picture))
    assert "".join(f"\x1b_G{keys};{data}\x1b\\" for keys, data in parts) == PROTOCOLS["kitty"](picture)
    assert [keys for keys, _ in parts] == ["a=T,f=100,q=2,m=1", *["m=1"] * (len(parts) - 2), "m=0"]
    assert len(parts) > 2 and all(len(data) <= 4096 and len(data) % 4 == 0 for _, data in parts)
    assert (pixels("".join(data for _, data in parts)) == np.asarray(picture)).all()


def test_iterm2_gets_the_picture_whole():
    picture = noise(7, 5)
    data = re.fullmatch(r"\x1b\]1337;File=inline=1;width=7px;height=5px:(.*)\x07", PROTOCOLS["iterm2"](picture))[1]
    assert (pixels(data) == np.asarray(picture)).all()


def decode_sixel(text):
    """A slow reading of DEC's rules: colours in per cent, ``!`` repeats, ``$`` back to the left, ``-`` next six rows."""
    width, height, body = re.fullmatch(r'\x1bPq"1;1;(\d+);(\d+)(.*)\x1b\\', text, re.DOTALL).groups()
    canvas = np.full((int(height) + 6, int(width), 3), -1)
    colours, x, top, colour = {}, 0, 0, None
    tokens = re.findall(r"#(\d+);2;(\d+);(\d+);(\d+)|#(\d+)|!(\d+)([?-~])|([?-~])|([$-])", body)
    for k, r, g, b, chosen, times, repeated, once, control in tokens:
        if k:
            colours[k] = (int(r), int(g), int(b))
        elif chosen:
            colour = colours[chosen]
        elif control:
            x, top = 0, top + 6 * (control == "-")
        else:
            for _ in range(int(times or 1)):
                bits = ord(repeated or once) - 63
                for row in range(6):
                    if bits >> row & 1:
                        canvas[top + row, x] = colour
                x += 1
    return canvas[: int(height)]


@pytest.mark.parametrize("size", [(1, 1), (9, 6), (33, 13)])
def test_sixel_is_the_picture_in_256_colours(size):
    picture = noise(*size)
    picture.paste((10, 20, 30), (0, 0, size[0] // 2, size[1]))  # with runs to shorten
    decoded = decode_sixel(PROTOCOLS["sixel"](picture))
    expected = np.asarray(picture.quantize(256).convert("RGB")) / 2.55
    assert np.abs(decoded - expected).max() <= 0.5 + 1e-9  # rounded to per cent


@pytest.mark.parametrize("size", [(3, 4), (2, 3)])
def test_blocks_are_two_pixels_a_character(size):
    picture = noise(*size)
    lines = PROTOCOLS["blocks"](picture).split("\n")
    assert len(lines) == (size[1] + 1) // 2
    for y, line in enumerate(lines):
        cells = re.findall(r"\x1b\[38;2;(\d+);(\d+);(\d+)m(?:\x1b\[48;2;(\d+);(\d+);(\d+)m)?\u2580", line)
        assert line.endswith("\x1b[0m") and len(cells) == size[0]
        for x, cell in enumerate(cells):
            assert tuple(map(int, cell[:3])) == picture.getpixel((x, 2 * y))
            if 2 * y + 1 < size[1]:
                assert tuple(map(int, cell[3:])) == picture.getpixel((x, 2 * y + 1))


@pytest.mark.parametrize(
    ("environment", "expected"),
    [
        ({"TERM": "xterm-kitty", "KITTY_WINDOW_ID": "1"}, "kitty"),
        ({"TERM": "tmux-256color", "TMUX": "x", "KITTY_WINDOW_ID": "1"}, None),  # tmux swallows its codes
        ({"TERM": "screen", "TERM_PROGRAM": "iTerm.app", "COLORTERM": "truecolor"}, "blocks"),
        ({"TERM": "xterm-256color", "TERM_PROGRAM": "WezTerm"}, "iterm2"),
        ({"TERM": "xterm-256color", "LC_TERMINAL": "iTerm2"}, "iterm2"),  # over ssh
        ({"TERM": "foot", "COLORTERM": "truecolor"}, "sixel"),
        ({"TERM": "xterm-256color", "COLORTERM": "truecolor"}, "blocks"),
        ({"TERM": "dumb"}, None),
        ({}, None),
    ],
)
def test_the_terminal_is_known_by_its_environment(environment, expected):
    assert protocol_of(environment) == expected


def test_small_pictures_grow_by_whole_steps_and_large_ones_shrink():
    assert fitted(noise(32, 20), 100, 100).size == (96, 60)
    assert fitted(noise(1, 1), 9000, 9000).size == (16, 16)
    assert fitted(noise(400, 20), 100, 100).size == (100, 5)
    assert fitted(noise(4000, 1), 100, 100).size == (100, 1)
    assert (np.asarray(fitted(noise(3, 3), 6, 6))[::2, ::2] == np.asarray(noise(3, 3))).all()


def test_pictures_of_any_kind_are_read_and_others_refused(tmp_path, monkeypatch):
    text = PngInfo()
    text.add_itxt("prompt", "a caf\u00e9")
    Image.new("RGBA", (2, 3), (255, 0, 0, 0)).save(tmp_path / "a.png", pnginfo=text)
    picture, prompt = read_picture(tmp_path / "a.png")
    assert picture.mode == "RGB" and picture.getpixel((0, 0)) == (255, 255, 255) and prompt == "a caf\u00e9"
    Image.new("CMYK", (2, 3)).save(tmp_path / "b.jpg")
    assert read_picture(tmp_path / "b.jpg")[0].mode == "RGB"
    (tmp_path / "cut.png").write_bytes((tmp_path / "a.png").read_bytes()[:-30])
    for name in ("cut.png", "missing.png"):
        with pytest.raises(InputError, match="cannot read the picture"):
            read_picture(tmp_path / name)
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 5)
    with pytest.raises(InputError, match="DecompressionBomb"):
        read_picture(tmp_path / "a.png")


# --- the terminal


def at_work(monkeypatch, folder, script, size=(24, 80), terminal=None, environment=None):
    """Label a folder at a terminal; returns the outcome and all that the screen showed."""
    for name in ("TERM", "TERM_PROGRAM", "COLORTERM", "TMUX", "KITTY_WINDOW_ID", "LC_TERMINAL"):
        monkeypatch.delenv(name, raising=False)
    for name, value in (environment or {}).items():
        monkeypatch.setenv(name, value)
    images = find_images(folder)
    with at_a_terminal(monkeypatch, script, size) as typist:
        with Terminal(**terminal or {}) as keys:
            outcome = label_images(images, Table(table_path(folder), images), keys)
    return outcome, typist.screen


def test_keys_are_read_one_at_a_time_without_enter(folder, monkeypatch):
    script = [(ASKS, "x"), ("", "A"), ("", "a"), (ASKS, "c"), (ASKS, "s"), (ASKS, "u"), (ASKS, "a"), (ASKS, "q")]
    outcome, screen = at_work(monkeypatch, folder, script)
    order = [image.file for image in find_images(folder)]
    assert rows(folder / "labels.csv") == dict(zip(order, ["1", "0", "1"], strict=False))
    assert outcome == Outcome(images=4, artifact=2, clean=1, skipped=0)
    assert str(folder / order[0]) in screen and "1 of 4" in screen and "undone" in screen


@pytest.mark.parametrize("key", [b"\x1b[A", b"\x1b[1;5C", b"\x1bOa", b"\xc3\xa4", b"\x00", b"\n"])
def test_other_keys_are_no_verdict(folder, monkeypatch, key):
    outcome, _ = at_work(monkeypatch, folder, [(ASKS, key)])
    assert outcome.artifact + outcome.clean + outcome.skipped == 0


def test_a_key_pressed_before_the_picture_was_there_is_no_verdict_on_it(folder, monkeypatch):
    outcome, _ = at_work(monkeypatch, folder, [(ASKS, "aaac"), (ASKS, "q")])
    assert outcome.artifact + outcome.clean == 1


@pytest.mark.parametrize("end", [b"\x04", b"q"])
def test_the_end_of_input_quits(folder, monkeypatch, end):
    outcome, _ = at_work(monkeypatch, folder, [(ASKS, b"a"), (ASKS, end)])
    assert outcome.artifact == 1


@pytest.fixture
def interruptible():
    """A process started in the background of a shell ignores SIGINT."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.usefixtures("interruptible")
def test_ctrl_c_gives_the_terminal_back(folder, monkeypatch):
    with at_a_terminal(monkeypatch, []), pytest.raises(KeyboardInterrupt), Terminal() as terminal:
        links = terminal._links.name
        signal.raise_signal(signal.SIGINT)
    with pytest.raises(FileNotFoundError):
        open(links)


def test_pictures_are_shown_where_the_terminal_takes_them(folder, monkeypatch):
    environment = {"TERM": "xterm-kitty", "COLORTERM": "truecolor"}
    _, screen = at_work(monkeypatch, folder, [(ASKS, "q")], environment=environment)
    first = find_images(folder)[0]
    assert (pixels(re.search(r"m=0;([^\x1b]*)", screen)[1])[:4:2, ::16].shape) == (2, 6, 3)  # 6 x 4, sixteen times
    assert screen.index("\x1b_G") < screen.index("1 of 4") and str(first.path) in screen


def test_blocks_are_used_only_where_they_show_every_pixel(folder, monkeypatch):
    environment = {"TERM": "xterm", "COLORTERM": "truecolor"}
    _, screen = at_work(monkeypatch, folder, [(ASKS, "q")], environment=environment)
    assert screen.count("\u2580") == 6 * 2
    _, screen = at_work(monkeypatch, folder, [(ASKS, "q")], size=(24, 5), environment=environment)
    assert "\u2580" not in screen
    _, screen = at_work(monkeypatch, folder, [(ASKS, "q")], size=(24, 5), terminal={"pictures": "blocks"})
    assert screen.count("\u2580") == 5 * 2  # asked for: 5 x 3 pixels


def test_of_a_run_neither_the_screen_nor_the_viewer_tells_what_the_guard_thought(tmp_path, monkeypatch):
    run = made_up_run(tmp_path / "run", {"a bag": "uuu"})
    for image in find_images(run)[:1]:
        image.path.write_bytes(b"damaged")  # errors name the file, too
    seen = tmp_path / "seen.txt"
    viewer = tmp_path / "viewer.sh"
    viewer.write_text(f'#!/bin/sh\necho "$@" >> {seen}\necho shown > /dev/tty 2> /dev/null\nexec sleep 60\n')
    viewer.chmod(0o755)

    class Patient(Terminal):
        def key(self, known):
            while not seen.exists() or len(seen.read_text().splitlines()) < self._shown:
                time.sleep(0.01)
            return super().key(known)

    monkeypatch.setattr(f"{__name__}.Terminal", Patient)
    outcome, screen = at_work(
        monkeypatch,
        run,
        [(ASKS, "s"), (ASKS, "a"), (ASKS, "c"), ("u undo, q quit", "q")],
        terminal={"viewer": f"{viewer} --fill 'a b'"},
    )
    assert outcome == Outcome(images=3, artifact=1, clean=1, skipped=1)
    assert "audited" not in screen and "audited" not in seen.read_text()
    assert "cannot read the picture" in screen and '"a bag"' in screen
    paths = [line.removeprefix("--fill a b ") for line in seen.read_text().splitlines()]
    assert [path.rpartition("/")[2] for path in paths] == ["1.png", "2.png", "3.png"]
    assert all(path in screen for path in paths)


def test_what_a_file_says_is_not_obeyed_by_the_terminal(tmp_path, monkeypatch):
    text = PngInfo()
    text.add_itxt("prompt", "a \x1b]0;mine\x07 bag \u202e caf\u00e9\n in two lines")
    Image.new("RGB", (2, 2)).save(tmp_path / "a\x1b[2J.png", pnginfo=text)
    _, screen = at_work(monkeypatch, tmp_path, [(ASKS, "q")])
    assert "\x1b" not in screen and "\x07" not in screen and "\u202e" not in screen
    assert "caf\u00e9 in two lines" in screen


def test_without_a_terminal_or_a_viewer_nothing_starts(folder, monkeypatch):
    with pytest.raises(InputError, match="needs a terminal"):
        Terminal(keyboard=io.StringIO(), screen=io.StringIO())
    with at_a_terminal(monkeypatch, []):
        for arguments, message in [
            ({"viewer": "no-such-viewer -f"}, "there is no such program"),
            ({"viewer": "'"}, "is not a command"),
            ({"viewer": ""}, "there is no such program"),
            ({"pictures": "ascii"}, "pictures must be auto, none or one of kitty, iterm2, sixel, blocks, got 'ascii'"),
        ]:
            with pytest.raises(InputError, match=message):
                Terminal(**arguments)
