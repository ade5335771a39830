"""The page of app.py in a real browser, by mouse events. Skipped if no browser is installed."""

from __future__ import annotations

import base64
import io
import shlex
import threading
import urllib.parse
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import tifffile
from browser import CHROMIUM, DRIVER, MISSING, Browser
from PIL import Image
from script_helpers import call
from test_app import FLAGS, cells, checkpoint_of, serving
from tiny_sit import write_checkpoint

import sample
from dataset.config import DataConfig
from dataset.files import encode_image
from dataset.masks import MaskRule
from page.service import Service

pytestmark = [pytest.mark.slow, pytest.mark.skipif(not (CHROMIUM and DRIVER), reason=MISSING)]
STROKE = [(0.3, 0.3), (0.4, 0.35), (0.5, 0.3)]
IS_DONE = "document.body.dataset.state === 'done' && document.body.dataset.state"


@pytest.fixture(scope="module")
def service(tmp_path_factory) -> Iterator[Service]:
    checkpoint = checkpoint_of(tmp_path_factory.mktemp("page") / "two.pt", 2, crop="random")
    with serving(checkpoint) as service:
        yield service


@pytest.fixture(scope="module")
def window(service, tmp_path_factory) -> Iterator[Browser]:
    with Browser(tmp_path_factory.mktemp("browser")) as browser:
        browser.open(service.url)
        browser.wait(IS_DONE)
        yield browser


@pytest.fixture
def page(window) -> Browser:
    """The page with an empty canvas."""
    window.run("document.getElementById('error').hidden = true")
    window.click("#clear")
    window.wait("editor.label.every((value) => value === 0)")
    window.wait(IS_DONE)
    return window


def label_of(page: Browser) -> np.ndarray:
    values = page.run("return [editor.height, editor.width, ...editor.label]")
    return np.array(values[2:], np.uint16).reshape(values[:2])


def files_of(page: Browser) -> tuple[bytes, bytes, str, str]:
    """The sheet, the mask, its name and the command that the page shows."""
    sheet, mask, name = page.run("return [reply.sheet, reply.mask.content, reply.mask.name]")
    return base64.b64decode(sheet), base64.b64decode(mask), name, page.run("return byId('command').textContent")


def test_a_cell_drawn_by_mouse_gives_the_image_of_the_command_shown(page, tmp_path, monkeypatch):
    page.drag("#mask", STROKE)
    page.wait(IS_DONE)
    label = label_of(page)
    assert set(np.unique(label)) == {0, 1}
    assert label[4:6, 5:8].all()  # where the stroke went
    assert page.run("return byId('image').naturalWidth") == 16
    sheet, mask, name, command = files_of(page)
    monkeypatch.chdir(tmp_path)
    Path(name).write_bytes(mask)
    call(sample, *shlex.split(command)[2:])
    assert Path("samples.png").read_bytes() == sheet


def test_every_stroke_is_a_cell_and_undo_takes_the_last_one_back(page):
    page.drag("#mask", STROKE)
    page.drag("#mask", [(0.2, 0.8), (0.6, 0.8)])
    page.wait(IS_DONE)
    assert label_of(page).max() == 2
    page.click("#undo")
    page.wait(IS_DONE)
    assert label_of(page).max() == 1
    page.click("#redo")
    assert label_of(page).max() == 2


def test_another_size_keeps_the_cells_and_undo_brings_the_old_size_back(page):
    page.drag("#mask", STROKE)
    before = label_of(page)
    page.run("byId('size').value = '32 × 32'; byId('size').dispatchEvent(new Event('change'))")
    page.wait(IS_DONE)
    after = label_of(page)
    assert after.shape == (32, 32) and np.array_equal(after[8:24, 8:24], before)
    assert np.count_nonzero(after) == np.count_nonzero(before) > 0
    page.click("#undo")
    assert np.array_equal(label_of(page), before)
    assert page.run("return byId('size').value") == "16 × 16"
    page.wait(IS_DONE)


def test_a_second_finger_draws_nothing(page):
    page.run(
        "const { canvas } = editor; const box = canvas.getBoundingClientRect(); canvas.setPointerCapture = () => {};"
        "const send = (kind, pointerId, x, y) => canvas.dispatchEvent(new PointerEvent(kind, { pointerId,"
        " clientX: box.left + x * box.width, clientY: box.top + y * box.height }));"
        "send('pointerdown', 1, 0.2, 0.2); send('pointerdown', 2, 0.9, 0.9); send('pointermove', 2, 0.8, 0.9);"
        "send('pointerup', 2, 0.8, 0.9); send('pointermove', 1, 0.4, 0.2); send('pointerup', 1, 0.4, 0.2);"
        "delete canvas.setPointerCapture"
    )
    label = label_of(page)
    assert label[3, 3:7].all() and not label[8:].any()
    assert page.run("return editor.stroke") is None
    page.wait(IS_DONE)


def test_a_file_dropped_beside_the_canvas_is_loaded_and_a_drawing_is_not_lost_unasked(page):
    content = base64.b64encode(encode_image(np.eye(16, dtype=np.uint8)[:, :, None] * 255)).decode()
    assert page.run("return editor.isSaved = true")
    page.run(
        "const files = new DataTransfer(); files.items.add(new File([fromBase64(arguments[0])], 'a.png'));"
        "document.querySelector('header').dispatchEvent(new DragEvent('drop', { dataTransfer: files, bubbles: true }))",
        content,
    )
    page.wait("editor.label.some((value) => value)")
    page.wait(IS_DONE)
    leave = "const event = new Event('beforeunload', { cancelable: true }); window.dispatchEvent(event);"
    leave += "return event.defaultPrevented"
    assert page.run(leave) is False
    page.drag("#mask", STROKE)
    assert page.run(leave) is True
    page.run("editor.isSaved = true")
    page.wait(IS_DONE)


def test_a_service_with_another_checkpoint_is_noticed(page):
    page.run("model.before = model.checkpoint; model.checkpoint = 'another'")
    page.click("#next")
    page.wait("!byId('error').hidden")
    assert "another checkpoint" in page.run("return byId('error').textContent")
    page.run("model.checkpoint = model.before; changed()")
    page.wait(IS_DONE)


def test_what_an_outline_encloses_becomes_a_cell(page):
    page.run("setTool('outline')")
    page.drag("#mask", [(0.25, 0.25), (0.75, 0.25), (0.75, 0.5), (0.25, 0.5)])
    page.run("setTool('brush')")
    page.wait(IS_DONE)
    expected = np.zeros((16, 16), np.uint16)
    expected[4:8, 4:12] = 1
    assert np.array_equal(label_of(page), expected)


def test_the_canvas_shows_the_boundary_that_the_model_sees(page):
    page.run("editor.replace(Uint16Array.from(arguments[0]))", cells().ravel().tolist())
    shown = page.run("editor.hasBoundary = true; return [...editor.label.keys()].map((n) => editor.isBoundary(n))")
    page.run("editor.hasBoundary = false")
    boundary = MaskRule("instances", 3, 1.0, "drawn").class_map(cells()) == 2
    assert boundary.any()
    assert np.array_equal(np.reshape(shown, (16, 16)), boundary)


def test_a_chosen_look_and_a_reference_image_change_command_and_image(tmp_path, window):
    checkpoint = checkpoint_of(tmp_path / "looking.pt", 2, looks=5)
    reference = tmp_path / "reference.png"
    Image.fromarray(np.random.default_rng(0).integers(0, 90, (40, 30), np.uint8)).save(reference)
    with serving(checkpoint) as service, Browser(tmp_path / "browser") as page:
        page.open(service.url)
        page.wait("looks !== null")
        page.wait(IS_DONE)
        sheets, commands = [], []
        for choose in (
            lambda: page.click("#looks button:nth-child(5)"),  # after "by seed" and "none": number 2
            lambda: page.give_file("#look_file", reference),
            lambda: page.click("#looks button:nth-child(2)"),
        ):
            page.run("reply = null; document.body.dataset.state = 'idle'")
            choose()
            page.wait(f"reply && {IS_DONE}")
            sheet, _, _, command = files_of(page)
            sheets.append(sheet)
            commands.append(command)
    assert "--look training --look-index 2" in commands[0]
    assert "--look-path reference.png" in commands[1]
    assert "--look none" in commands[2]
    assert len(set(sheets)) == 3


def test_a_stroke_during_a_drawing_cancels_it(page):
    page.run("byId('steps').value = 250; changed()")
    page.wait("document.body.dataset.state === 'full'")
    page.drag("#mask", STROKE)
    page.wait("document.body.dataset.state === 'full'")
    page.run("byId('steps').value = 2; changed()")
    page.wait(IS_DONE)
    assert page.run("return reply.nfe") == 3  # of ab2
    page.run("byId('steps').value = 32; changed()")
    page.wait(IS_DONE)


def test_a_label_file_of_sixteen_bits_is_loaded(page, tmp_path):
    path = tmp_path / "label.tif"
    tifffile.imwrite(path, cells())
    page.run("byId('mask_type').value = 'instances'")
    page.give_file("#file", path)
    page.wait("editor.label.some((value) => value === 3)")
    page.wait(IS_DONE)
    expected = cells()
    expected[expected == 300] = 3
    assert np.array_equal(label_of(page), expected)
    page.run("byId('mask_type').value = 'auto'")


def test_a_broken_file_is_a_message_on_the_page(page, tmp_path):
    path = tmp_path / "broken.png"
    path.write_bytes(b"no picture")
    page.give_file("#file", path)
    page.wait("!byId('error').hidden")
    assert "broken.png" in page.run("return byId('error').textContent")
    path.write_bytes(encode_image(np.arange(256, dtype=np.uint8).reshape(16, 16, 1) // 90))
    page.give_file("#file", path)
    page.wait("byId('error').textContent.includes('File holds: cell numbers')")
    page.drag("#mask", STROKE)
    page.wait(IS_DONE)


def test_two_visitors_at_once_get_their_own_images(page, service, tmp_path):
    with Browser(tmp_path) as other:
        other.open(service.url)
        other.wait(IS_DONE)
        page.drag("#mask", STROKE)
        other.click("#clear")
        for one in (page, other):
            one.wait(IS_DONE)
        assert label_of(page).any()
        assert not label_of(other).any()
        assert files_of(page)[0] != files_of(other)[0]


def test_no_request_leaves_the_machine_and_the_page_has_no_complaints(page, service):
    urls = page.requests()
    assert any(url.startswith(service.url + "/api/draw?") for url in urls)
    hosts = {urllib.parse.urlsplit(url).netloc for url in urls if not url.startswith(("data:", "blob:"))}
    assert hosts == {urllib.parse.urlsplit(service.url).netloc}
    assert [line for line in page.complaints() if "400" not in line] == []  # 400: the broken file


def test_a_long_drawing_tells_its_progress_and_stops_at_a_button(page):
    page.run(
        "byId('steps').value = 250; byId('size').value = '128 × 128'; byId('size').dispatchEvent(new Event('change'))"
    )
    page.wait(
        "document.body.dataset.state === 'full' && !byId('busy').hidden && /%/.test(byId('busy_text').textContent)"
    )
    page.click("#stop")
    assert page.run("return [running, byId('busy_text').textContent]") == [None, "Stopped"]
    page.run("byId('steps').value = 2; byId('size').value = '16 × 16'; byId('size').dispatchEvent(new Event('change'))")
    page.wait(IS_DONE)
    page.run("byId('steps').value = 32; changed()")
    page.wait(IS_DONE)
    assert page.run("return byId('busy').hidden")


def test_nine_images_are_all_previewed_and_each_can_be_shown(page):
    page.click("[data-count='9']")
    page.wait("document.body.dataset.state === 'previewed' && byId('thumbs').children.length === 9")
    page.wait(IS_DONE)
    page.click("#thumbs button:nth-child(4)")
    assert page.run("return byId('which').textContent") == "4 of 9"
    assert page.run("return byId('image').src === byId('thumbs').children[3].firstChild.src")
    page.click("[data-count='1']")
    page.wait(IS_DONE)
    assert page.run("return byId('which').hidden")


def test_the_keyboard_draws_undoes_and_chooses(page):
    page.run("editor.canvas.focus()")
    for key in ("ArrowRight", "ArrowRight", " ", "]"):
        page.run("editor.canvas.dispatchEvent(new KeyboardEvent('keydown', {key: arguments[0], bubbles: true}))", key)
    page.wait(IS_DONE)
    label = label_of(page)
    assert label[8, 10] == 1 and label[0, 0] == 0
    press = "document.body.dispatchEvent(new KeyboardEvent('keydown', {key: 'z', ctrlKey: true, bubbles: true}))"
    page.run(press)
    page.wait(IS_DONE)
    assert not label_of(page).any()
    arrow = "new KeyboardEvent('keydown', {key: 'ArrowRight', bubbles: true})"
    page.run(f"const first = byId('tools').firstElementChild; first.focus(); first.dispatchEvent({arrow})")
    assert page.run("return [editor.tool, document.activeElement.dataset.tool]") == ["outline", "outline"]
    page.run("setTool('brush'); byId('brush').value = 3; showNumbers()")


def test_every_control_has_a_name_and_nothing_is_wider_than_a_phone(page):
    unnamed = page.run(
        "const named = (one) => one.textContent.trim() || one.ariaLabel || one.title || (one.labels || []).length;"
        "const all = [...document.querySelectorAll('button, input, select, canvas#mask')];"
        "return all.filter((one) => !named(one)).map((one) => one.outerHTML)"
    )
    assert unnamed == []
    page.resize(420, 900)
    assert page.run("return document.documentElement.scrollWidth <= window.innerWidth")
    page.resize(1440, 1000)


def test_a_mask_of_the_folder_starts_a_drawing_and_the_page_says_when_the_service_is_gone(tmp_path):
    (tmp_path / "masks").mkdir()
    for number, size in enumerate((5, 9)):
        mask = np.zeros((16, 16), np.uint8)
        mask[2 : 2 + size, 3 : 3 + size] = 255
        Image.fromarray(mask).save(tmp_path / "masks" / f"{number}.png")
    checkpoint = checkpoint_of(tmp_path / "two.pt", 2)
    with Browser(tmp_path / "browser") as page:
        with serving(checkpoint, "--mask-path", tmp_path / "masks") as service:
            page.open(service.url)
            page.wait("byId('masks').children.length === 2")
            page.wait(IS_DONE)
            page.click("#masks button:nth-child(2)")
            page.wait("editor.label.filter((value) => value).length === 81")
            page.wait(IS_DONE)
            page.run("byId('mask_filter').value = '0'; byId('mask_filter').dispatchEvent(new Event('input'))")
            page.wait("byId('masks').children.length === 1")
            page.run("byId('mask_filter').value = ''; showMasks(false); showMasks(false)")  # a double click
            page.wait("byId('masks').children.length === 2")
            page.run("byId('masks').lastChild.remove(); showMasks(true); return showMasks(true)")
            assert page.run("return [...byId('masks').children].map((one) => one.title)") == ["0", "1"]
        page.click("#next")
        page.wait("!byId('error').hidden")
        assert "does not answer" in page.run("return byId('error').textContent")
        assert page.run("return [byId('busy').hidden, byId('busy_text').textContent]") == [False, "Not drawn"]
        saved = Image.open(downloaded(page, "label_png", "label.png"))
        assert np.array_equal(np.asarray(saved), label_of(page))


def downloaded(page: Browser, what: str, name: str) -> Path:
    """The file that a button saves. A busy machine may take its time."""
    page.click(f"[data-file='{what}']")
    for _ in range(600):
        if (page.downloads / name).is_file():
            return page.downloads / name
        threading.Event().wait(0.1)
    raise AssertionError(f"the browser saved no {name} within a minute")


def test_downloads_are_the_image_and_its_label_in_sixteen_bits(page):
    page.run("editor.replace(Uint16Array.from(arguments[0]))", cells().ravel().tolist())
    page.wait(IS_DONE)
    tiff = tifffile.imread(downloaded(page, "label_tif", "label.tif"))
    png = Image.open(downloaded(page, "label_png", "label.png"))
    assert tiff.dtype == np.uint16 and png.mode == "I;16"
    assert np.array_equal(tiff, cells()) and np.array_equal(np.asarray(png), cells())
    assert page.run("return editor.isSaved")
    seed = page.run("return byId('seed').value")  # other tests have changed it
    image = Image.open(downloaded(page, "image", f"image_{seed}_0.png"))
    shown = page.run("return reply.images[0].file")
    assert np.array_equal(np.asarray(image), np.asarray(Image.open(io.BytesIO(base64.b64decode(shown)))))


def test_files_of_an_older_drawing_are_not_offered(page):
    page.run("editor.replace(editor.label.map(() => 1))")
    assert page.run("return [...document.querySelectorAll('[data-file]')].map((one) => one.disabled)") == [
        True, False, False, True, True
    ]  # fmt: skip
    page.wait(IS_DONE)
    assert page.run("return [...document.querySelectorAll('[data-file]')].every((one) => !one.disabled)")


def test_a_reload_keeps_the_drawing_and_its_settings(service, tmp_path):
    with Browser(tmp_path) as page:
        page.open(service.url)
        page.wait(IS_DONE)
        page.run("byId('steps').value = 3; byId('seed').value = 8; editor.clear()")
        page.run("editor.replace(Uint16Array.from(arguments[0]))", cells().ravel().tolist())
        page.wait(IS_DONE)
        page.open(service.url)
        page.wait(IS_DONE)
        assert np.array_equal(label_of(page), cells())
        assert page.run("return [byId('steps').value, byId('seed').value, reply.nfe]") == ["3", "8", 4]


def test_a_preview_that_takes_long_comes_after_a_sketch_of_the_image_shown(page):
    page.run(
        "window.asked = []; window.before = onlyRequest;"
        "onlyRequest = (state, path, body, ...others) => {"
        " asked.push([state, body.num_steps, body.only]); return before(state, path, body, ...others); }"
    )
    page.click("[data-count='4']")
    page.wait(IS_DONE)
    page.click("#thumbs button:nth-child(3)")
    page.run("asked.length = 0; pace = 1")
    page.run(
        "window.thumbs = []; window.sketch = showSketch;"
        "showSketch = (values) => { sketch(values);"
        " thumbs.push([...byId('thumbs').children].map((one) => one.disabled)); }"
    )
    page.click("#next")
    page.wait(IS_DONE)
    assert page.run("return thumbs") == [[True] * 4]  # they show the mask before
    assert page.run("return [...byId('thumbs').children].some((one) => one.disabled)") is False
    page.run("showSketch = sketch")
    assert page.run("return asked") == [["sketch", 2, 2], ["preview", 6, None], ["full", 32, None]]
    assert page.run("return byId('which').textContent") == "3 of 4"
    page.run("onlyRequest = before")
    page.click("[data-count='1']")
    page.wait(IS_DONE)


def test_the_image_follows_the_zoom_of_the_canvas(page):
    page.click("#zoom_in")
    page.wait("byId('image').style.transform.includes('scale(1.5)')")
    box = "byId('{}').getBoundingClientRect()"
    image, square = box.format("image"), box.format("picture")
    left, top, width = page.run(
        f"const [a, b] = [{image}, {square}]; return [a.left - b.left, a.top - b.top, a.width / b.width]"
    )
    assert abs(width - 1.5) < 0.01
    assert np.allclose([left, top], page.run("return [editor.left, editor.top]"), atol=1)
    left = page.run("return editor.left")
    page.run("setTool('move')")
    page.drag("#mask", [(0.5, 0.5), (0.6, 0.5)])
    assert page.run("return editor.left") > left
    assert not label_of(page).any()
    page.run("setTool('brush')")
    page.click("#zoom_fit")
    page.wait("byId('image').style.transform === 'none'")


def test_the_other_end_of_a_pen_erases(page):
    page.run("editor.replace(editor.label.map(() => 1))")
    page.run(
        "const { canvas } = editor; const box = canvas.getBoundingClientRect(); canvas.setPointerCapture = () => {};"
        "const send = (kind) => canvas.dispatchEvent(new PointerEvent(kind, { pointerId: 1, pointerType: 'pen',"
        " button: 5, clientX: box.left + box.width / 2, clientY: box.top + box.height / 2 }));"
        "send('pointerdown'); send('pointerup'); delete canvas.setPointerCapture"
    )
    label = label_of(page)
    assert label[8, 8] == 0 and label[0, 0] == 1
    page.wait(IS_DONE)


def test_a_file_that_is_too_large_is_not_sent(page):
    page.run("load(new File([new Uint8Array(model.most.bytes + 1)], 'slide.tif'))")
    assert "slide.tif has 33 MiB" in page.run("return byId('error_text').textContent")
    page.click("#error_close")
    assert page.run("return byId('error').hidden")


def test_the_tab_key_stops_once_in_every_group_of_choices(page):
    page.click("[data-count='4']")
    page.wait(IS_DONE)
    groups = page.run(
        "const groups = [...document.querySelectorAll('[role=radiogroup]')].filter((one) => one.children.length);"
        "return groups.map((one) => one.querySelectorAll('button[tabindex=\"0\"]').length)"
    )
    assert len(groups) >= 3 and set(groups) == {1}
    page.click("[data-count='1']")
    page.wait(IS_DONE)


@pytest.mark.parametrize("side", [4, 8])
def test_a_model_of_few_pixels_shows_a_first_image(tmp_path, side):
    sizes = {"name": f"SiT-Ti/{side}", "num_heads": 2}
    checkpoint = write_checkpoint(tmp_path / "small.pt", DataConfig(side, 2, channels=1), step=7, **sizes)
    with serving(checkpoint) as service, Browser(tmp_path / "browser") as page:
        page.open(service.url)
        page.wait(f"document.body.dataset.state === 'idle' || ({IS_DONE})")
        assert page.run("return [byId('error').hidden, byId('image').naturalWidth]") == [True, side]


def test_cells_become_classes_and_classes_become_cells_and_undo_goes_back(tmp_path):
    classes = MaskRule("instances", 3, 1.0, "drawn").class_map(cells())
    apart = np.where(classes == 1, np.minimum(cells(), 3), 0)
    checkpoint = checkpoint_of(tmp_path / "three.pt", 3)
    with serving(checkpoint) as service, Browser(tmp_path / "browser") as page:
        page.open(service.url)
        page.wait(IS_DONE)
        page.run("editor.replace(Uint16Array.from(arguments[0]))", cells().ravel().tolist())
        page.wait(IS_DONE)
        seen = page.run("return reply.mask_picture")

        def shows(kind: str, label: np.ndarray) -> None:
            assert np.array_equal(label_of(page), label)
            assert page.run("return [editor.kind, byId('kind').value]") == [kind, kind]
            assert page.run("return byId('classes').children.length") == (3 if kind == "classes" else 0)

        def choose(kind: str) -> None:
            page.run("byId('kind').value = arguments[0]; byId('kind').dispatchEvent(new Event('change'))", kind)
            page.wait(f"editor.kind === '{kind}'")
            page.wait(IS_DONE)

        choose("classes")
        shows("classes", classes)
        assert page.run("return reply.mask_picture") == seen
        choose("cells")
        shows("cells", apart)
        assert page.run("return byId('count').textContent").startswith("3 cells")
        page.click("#undo")
        shows("classes", classes)
        page.click("#undo")
        shows("cells", cells())
        page.wait(IS_DONE)


def test_the_command_line_of_the_page_is_that_of_its_own_flags(page):
    words = shlex.split(files_of(page)[3])
    assert words[words.index("--device") + 1] == FLAGS[1]
    assert "--per-proc-batch-size" in words
