"""The page in a real browser, by clicking: the video plays while it is made, the prompt changes,
tabs come and go.
"""

import importlib.util
import pathlib
import shutil
import time

import pytest

_MISSING = [name for name in ("chromium", "chromedriver") if not shutil.which(name)]
_MISSING += [name for name in ("selenium", "aiohttp") if importlib.util.find_spec(name) is None]
if _MISSING:
  pytest.skip(
    f"clicking through the page: not installed: {', '.join(_MISSING)} (apt-get install chromium "
    "chromium-driver)",
    allow_module_level=True,
  )

from PIL import Image
from selenium import webdriver
from selenium.webdriver.common.action_chains import ActionChains
from selenium.webdriver.common.by import By
from selenium.webdriver.support.ui import Select, WebDriverWait

from hiar_jax.serving.session import Limits
from hiar_jax.streaming.compiled_tick import TickOptions
from hiar_jax.streaming.layout import Layout
from hiar_jax.streaming.streaming_model import StreamingModel
from tests.helpers import tiny_run
from tests.helpers.served_page import FakeSource, page
from tests.helpers.untrained import untrained

pytestmark = pytest.mark.browser

PROMPT = "a red circle moving left"
OPTIONS = [
  "--headless=new",
  "--no-sandbox",
  "--disable-gpu",
  "--disable-dev-shm-usage",
  "--window-size=900,1180",
]


@pytest.fixture(scope="module")
def browser():
  options = webdriver.ChromeOptions()
  for option in OPTIONS:
    options.add_argument(option)
  options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
  driver = webdriver.Chrome(
    options=options, service=webdriver.ChromeService(shutil.which("chromedriver"))
  )
  driver.set_page_load_timeout(120)
  yield driver
  driver.quit()


@pytest.fixture
def server(tmp_path, browser):
  with page(
    tmp_path, source=FakeSource(0.08), max_generations=1, limits=Limits(buffer_seconds=1.0)
  ) as server:
    yield server
    first, *others = browser.window_handles
    for other in others:
      browser.switch_to.window(other)
      browser.close()
    browser.switch_to.window(first)
    complaints = [
      entry["message"] for entry in browser.get_log("browser") if entry["level"] == "SEVERE"
    ]
    browser.get("about:blank")
  assert complaints == []


def find(browser, name):
  return browser.find_element(By.ID, name)


def click(browser, name):
  until(browser, lambda: find(browser, name).is_enabled())
  find(browser, name).click()


def until(browser, condition, seconds=90):
  return WebDriverWait(browser, seconds, poll_frequency=0.1).until(lambda _: condition())


def start(browser, server, prompt=PROMPT, length="endless"):
  browser.get(server.url)
  until(browser, lambda: find(browser, "state").text == "ready")
  Select(find(browser, "length")).select_by_visible_text(length)
  find(browser, "prompt").send_keys(prompt)
  click(browser, "start")


def played(browser):
  return browser.execute_script("return document.getElementById('video').currentTime")


def state(browser):
  return find(browser, "state").text


def finished(browser):
  """Blocks that are finished, as the page has it."""
  return int(find(browser, "blocks").text)


def colour(browser):
  """Of the frame on the screen at the bar: the brightest of each channel."""
  return browser.execute_script("""
    const video = document.getElementById('video'), canvas = document.createElement('canvas');
    [canvas.width, canvas.height] = [video.videoWidth, video.videoHeight];
    const context = canvas.getContext('2d');
    context.drawImage(video, 0, 0);
    const pixels = context.getImageData(0, 0, canvas.width, canvas.height).data;
    const brightest = (values) => values.reduce((a, b) => Math.max(a, b), 0);
    return [0, 1, 2].map((channel) => brightest(pixels.filter((_, i) => i % 4 === channel)));
  """)


def test_the_video_plays_while_it_is_made(browser, server):
  start(browser, server)
  until(browser, lambda: played(browser) > 1)
  before = played(browser)
  until(browser, lambda: played(browser) > before + 1)
  assert state(browser) == "making" and server.making() == 1
  video = find(browser, "video")
  assert (video.get_property("videoWidth"), video.get_property("videoHeight")) == (128, 128)
  assert not video.get_property("error")
  assert find(browser, "latency").text.endswith(" s") and "frames/s" in find(browser, "speed").text
  rows = browser.find_elements(By.CSS_SELECTOR, "#levels li")
  assert (
    len(rows) == 5
    and rows[0].text.startswith("noise 1.00")
    and rows[-1].text.startswith("finished")
  )
  picture = pathlib.Path(server.queue.config.clips) / "page.png"
  browser.save_screenshot(str(picture))
  assert picture.stat().st_size > 10_000


@pytest.mark.slow
def test_a_changed_prompt_is_seen_within_the_levels(browser, server):
  start(browser, server)
  until(browser, lambda: played(browser) > 1)
  old = colour(browser)
  find(browser, "prompt").clear()
  find(browser, "prompt").send_keys("a blue square")
  made = server.source.streams[0].made
  click(browser, "change")
  until(browser, lambda: "will be the first to show it" in find(browser, "message").text)
  ((first, prompt, recache),) = server.source.opened[0].changes
  assert (prompt, recache) == ("a blue square", False)
  # ticks between reading `made` and the click's arrival
  assert first - made <= server.source.opened[0].levels + 1 + 3
  until(browser, lambda: find(browser, "caption").text == "a blue square")
  seconds = (3 * first) / server.source.fps
  until(browser, lambda: played(browser) > seconds + 0.3)
  assert sum(abs(a - b) for a, b in zip(old, colour(browser), strict=True)) > 40


@pytest.mark.slow
def test_a_networks_own_pipe(browser, tmp_path):
  """The prompt is changed while it stands still, so that blocks can be counted; the page says where
  it will be seen, and there it is.
  """
  source = StreamingModel(untrained(tmp_path, tiny_run.make_config()), TickOptions(layout=Layout()))
  source.engine.warm(PROMPT)
  (tmp_path / "clips").mkdir()
  with page(tmp_path / "clips", source=source) as server:
    start(browser, server)
    until(browser, lambda: played(browser) > 1)
    click(browser, "pause")
    until(browser, lambda: state(browser) == "paused")
    (client,) = server.queue.clients
    stream = client.session._stream
    until(browser, lambda: not (stream._work.ticking or stream._work.decoding))
    made, flight = stream.made, stream.in_flight
    find(browser, "prompt").clear()
    find(browser, "prompt").send_keys("a blue square moving up")
    click(browser, "change")
    until(browser, lambda: "will be the first to show it" in find(browser, "message").text)
    first = int(find(browser, "message").text.split()[1])
    levels = len(source.sigmas) - 1
    assert [block for _, block, _ in flight] == list(
      range(first - 1, made - 1, -1)
    ) and first <= made + levels
    rows = [row.text.split("\n") for row in browser.find_elements(By.CSS_SELECTOR, "#levels li")]
    assert [row[1:] for row in rows[1:levels]] == [
      [str(block), prompt] for _, block, prompt in flight
    ]
    click(browser, "pause")
    until(browser, lambda: find(browser, "caption").text == "a blue square moving up")
    assert played(browser) == pytest.approx(source.seconds(0)(first), abs=0.5)
    browser.get("about:blank")
    until(browser, lambda: not server.queue.clients and server.making() == 0)


@pytest.mark.slow
def test_pause_extend_and_download(browser, server):
  start(browser, server, length="10 s")
  until(browser, lambda: played(browser) > 0.5)
  click(browser, "pause")
  until(browser, lambda: state(browser) == "paused")
  stood, blocks = played(browser), finished(browser)
  time.sleep(1)
  assert played(browser) == pytest.approx(stood, abs=0.3) and finished(browser) <= blocks + 1
  click(browser, "pause")
  until(browser, lambda: played(browser) > stood + 1)
  click(browser, "extend")
  until(browser, lambda: "of 20.0 s" in find(browser, "made").text)
  link = find(browser, "download").get_attribute("href")
  kind = browser.execute_async_script(
    """
    const [link, done] = arguments;
    const size = async (answer) => (await answer.arrayBuffer()).byteLength;
    fetch(link).then(async (answer) => done([answer.status, await size(answer)]));
  """,
    link,
  )
  assert kind[0] == 200 and kind[1] > 1000
  click(browser, "stop")
  until(browser, lambda: state(browser) == "ended: stopped")
  until(browser, lambda: server.making() == 0)


@pytest.mark.slow
def test_it_ends_where_it_was_asked_to(browser, server):
  server.source.seconds = 0.0
  browser.get(server.url)
  until(browser, lambda: state(browser) == "ready")
  browser.execute_script("document.getElementById('length').options[1].value = '2'")
  find(browser, "prompt").send_keys(PROMPT + " zebra\n")
  until(browser, lambda: state(browser).startswith("finished"))
  until(browser, lambda: played(browser) > 1.9)
  assert "does not know 'zebra'" in find(browser, "message").text
  click(browser, "extend")
  until(browser, lambda: played(browser) > 2.6)


@pytest.mark.slow
def test_it_starts_from_a_picture(browser, server, tmp_path_factory):
  """What is no picture is one line on the page, and what is playing goes on."""
  folder = tmp_path_factory.mktemp("pictures")
  (folder / "cat.png").write_text("a cat")
  Image.new("RGB", (40, 20), (220, 30, 30)).save(folder / "red.png")
  start(browser, server)
  until(browser, lambda: played(browser) > 0.5)
  find(browser, "given").send_keys(str(folder / "cat.png"))
  click(browser, "start")
  until(
    browser,
    lambda: find(browser, "message").text.startswith("cat.png is neither a picture nor a video"),
  )
  before = played(browser)
  until(browser, lambda: played(browser) > before + 0.5)
  assert (
    len(server.source.opened) == 1
    and state(browser) == "making"
    and find(browser, "caption").text == PROMPT
  )

  find(browser, "given").send_keys(str(folder / "red.png"))
  click(browser, "start")
  until(
    browser,
    lambda: (
      find(browser, "message").text
      == "red.png: 20x40, scaled by 0.8 to cover 16x16, 50% of its width cropped"
    ),
  )
  until(browser, lambda: len(server.source.opened) == 2 and played(browser) > 0.5)
  assert server.source.starts[0] is None and server.source.starts[1].pixels[0, 8, 8].tolist() == [
    220,
    30,
    30,
  ]
  until(browser, lambda: server.making() == 1)

  click(browser, "nothing")
  assert (
    find(browser, "given").get_property("value") == ""
    and not find(browser, "nothing").is_displayed()
  )
  click(browser, "start")
  until(browser, lambda: len(server.source.opened) == 3)
  assert server.source.starts[2] is None


def test_a_file_that_is_too_large_is_not_sent(browser, server, tmp_path_factory):
  large = tmp_path_factory.mktemp("large") / "large.mp4"
  large.write_bytes(bytes(16 * 2**20))
  browser.get(server.url)
  until(browser, lambda: state(browser) == "ready")
  find(browser, "given").send_keys(str(large))
  click(browser, "start")
  until(
    browser,
    lambda: find(browser, "message").text == "large.mp4 has 16.0 MB; at most 15 can be sent.",
  )
  assert state(browser) == "ready" and server.source.opened == []


@pytest.mark.slow
def test_the_strip_shows_the_prompts_and_goes_back(browser, server):
  start(browser, server)
  until(browser, lambda: played(browser) > 1)
  find(browser, "prompt").clear()
  find(browser, "prompt").send_keys("a blue square")
  click(browser, "change")
  parts = lambda: browser.find_elements(By.CSS_SELECTOR, "#parts i")
  until(browser, lambda: len(parts()) == 2)
  titles = browser.execute_script(
    "return [...document.querySelectorAll('#parts i')].map((part) => part.title)"
  )
  assert titles == [PROMPT, "a blue square"]
  until(browser, lambda: played(browser) > 3)
  strip = find(browser, "strip")
  ActionChains(browser).move_to_element_with_offset(
    strip, 2 - strip.size["width"] // 2, 0
  ).click().perform()
  assert played(browser) < 1
  before = played(browser)
  until(browser, lambda: played(browser) > before + 0.5)


@pytest.mark.slow
def test_two_tabs_and_one_closed_in_the_middle(browser, server):
  start(browser, server)
  until(browser, lambda: played(browser) > 0.5)
  first = browser.current_window_handle
  browser.switch_to.new_window("window")
  start(browser, server, "a blue square")
  until(browser, lambda: "you are next" in state(browser))
  second = browser.current_window_handle
  browser.switch_to.window(first)
  browser.close()
  browser.switch_to.window(second)
  until(browser, lambda: played(browser) > 0.5)
  until(browser, lambda: len(server.queue.clients) == 1 and server.making() == 1)
  assert [generation.prompt for generation in server.source.opened] == [PROMPT, "a blue square"]
  browser.get("about:blank")
  until(browser, lambda: not server.queue.clients and server.making() == 0)


def test_a_prompt_is_a_text(browser, server):
  """What somebody types is shown as it is typed, and is never markup."""
  start(browser, server, "<img src=x onerror=alert(1)> <b>circle</b>")
  until(browser, lambda: played(browser) > 0.5)
  until(
    browser, lambda: find(browser, "caption").text == "<img src=x onerror=alert(1)> <b>circle</b>"
  )
  assert not browser.find_elements(By.CSS_SELECTOR, "main img, main b")
  assert find(browser, "prompt").get_attribute("maxlength") == "2000"


def test_the_server_goes_away_and_comes_back(browser, tmp_path):
  with page(tmp_path / "a", source=FakeSource(0.08)) as server:
    (tmp_path / "a").mkdir()
    start(browser, server)
    until(browser, lambda: played(browser) > 0.3)
  until(browser, lambda: "the server is not there" in state(browser))
  browser.get("about:blank")
  browser.get_log("browser")
