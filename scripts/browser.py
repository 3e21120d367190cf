"""Does it work where people look? JupyterLab and the explorer in a real browser: `make test-browser`; parts of it
by `.venv-browser/bin/python scripts/browser.py explorer|notebooks|site`.

Starts JupyterLab as `make lab` does (copies in lab-browser/, which go again), runs notebooks in Chromium, turns the explorer's
controls and checks what appears. It fails on any red block (an error, or text on stderr), any warning in a cell and any error
in the browser's console. Screenshots and times lie in screenshots/; they are to be looked at. Pages of the book (`make book`) are
opened where it has been built, and named as skipped where not.
"""

from __future__ import annotations

import http.server
import json
import os
import re
import secrets
import shutil
import socket
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from selenium import webdriver
from selenium.common.exceptions import StaleElementReferenceException
from selenium.webdriver.common.by import By
from selenium.webdriver.common.keys import Keys
from selenium.webdriver.remote.webelement import WebElement

ROOT = Path(__file__).resolve().parents[1]
COPIES, PICTURES, SITE = (
    ROOT / "lab-browser",
    ROOT / "screenshots",
    ROOT / "build" / "book" / "html",
)
NOTEBOOKS = ("00_start_here", "theory/1_from_bradley_terry_to_mixtures", "theory/3_gumbel_softmax")
PARTS = ("explorer", "notebooks", "site")
PAGES = 3  # of the book
PATIENCE = 420.0  # seconds that a notebook may take
HARMLESS = re.compile(r"favicon|/api/me|Autofocus|permissions policy|WebGL|GPU", re.IGNORECASE)
SETTINGS = {  # nothing that asks a person
    "@jupyterlab/apputils-extension/notification.jupyterlab-settings": {
        "fetchNews": "false",
        "checkForUpdates": False,
    },
    "@jupyterlab/notebook-extension/tracker.jupyterlab-settings": {
        "windowingMode": "none"
    },  # all cells are there
    "@jupyterlab/docmanager-extension/plugin.jupyterlab-settings": {"autosave": False},
}


class Lab:
    """JupyterLab on the project, on copies of its own, until the block ends."""

    def __enter__(self) -> Lab:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self.port = free.getsockname()[1]
        self.token = secrets.token_hex(16)
        settings = COPIES / ".settings"
        for name, values in SETTINGS.items():
            (settings / name).parent.mkdir(parents=True, exist_ok=True)
            (settings / name).write_text(json.dumps(values))
        options = [
            "--no-browser",
            f"--ServerApp.port={self.port}",
            f"--IdentityProvider.token={self.token}",
        ]
        options.append(f"--LabApp.user_settings_dir={settings}")
        self.log = (PICTURES / "jupyterlab.log").open("w")
        self.process = subprocess.Popen(
            [str(ROOT / ".venv/bin/python"), str(ROOT / "scripts/lab.py"), COPIES.name, *options],
            cwd=ROOT,
            stdout=self.log,
            stderr=self.log,
            env=os.environ | {"MIXDPO_ROOT": str(ROOT)},
        )
        wait(self._answers, 120, "JupyterLab answers (see screenshots/jupyterlab.log)")
        return self

    def _answers(self) -> bool:
        if self.process.poll() is not None:
            raise SystemExit("JupyterLab has ended: see screenshots/jupyterlab.log")
        try:
            with urllib.request.urlopen(self.address("api"), timeout=5):
                return True
        except (urllib.error.URLError, OSError):
            return False

    def address(self, path: str) -> str:
        """Of a page of this server."""
        return f"http://127.0.0.1:{self.port}/{path}?token={self.token}"

    def __exit__(self, *error: Any) -> None:
        self.process.terminate()
        try:
            self.process.wait(30)
        except subprocess.TimeoutExpired:
            self.process.kill()
        self.log.close()


def wait(what: Callable[[], Any], seconds: float, name: str) -> Any:
    """Until `what` gives something; then that."""
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        try:
            if found := what():
                return found
        except StaleElementReferenceException:
            pass
        time.sleep(0.1)
    raise SystemExit(f"[browser] error: waited {seconds:.0f} s in vain: {name}")


def expect(true: bool, otherwise: str) -> None:
    """End with a line where something is not as it should be."""
    if not true:
        raise SystemExit(f"[browser] error: {otherwise}")


def open_browser() -> webdriver.Chrome:
    """Chromium without a window of its own."""
    options = webdriver.ChromeOptions()
    options.binary_location = shutil.which("chromium") or "chromium"
    for one in (
        "--headless=new",
        "--no-sandbox",
        "--disable-dev-shm-usage",
        "--window-size=1440,1400",
    ):
        options.add_argument(one)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    service = webdriver.ChromeService(shutil.which("chromedriver") or "chromedriver")
    return webdriver.Chrome(options=options, service=service)


def all_of(browser: webdriver.Chrome, selector: str) -> list[WebElement]:
    """Elements of the page."""
    return browser.find_elements(By.CSS_SELECTOR, selector)


def check(browser: webdriver.Chrome, where: str) -> None:
    """No red block, no warning in a cell, no error in the console."""
    red = all_of(
        browser,
        "[data-mime-type='application/vnd.jupyter.stderr'], [data-mime-type='application/vnd.jupyter.error']",
    )
    found = [f"red block: {one.text[:300]}" for one in red]
    for output in all_of(browser, ".jp-OutputArea-output"):
        if match := re.search(r"\w*Warning\b.*", output.text):
            found.append(f"warning: {match.group()[:300]}")
    for line in browser.get_log("browser"):
        if line["level"] == "SEVERE" and not HARMLESS.search(line["message"]):
            found.append(f"console: {line['message'][:300]}")
    if found:
        picture(browser, f"failed-{where}")
        raise SystemExit(f"[browser] error: {where}: " + "\n".join(found))


def picture(browser: webdriver.Chrome, name: str) -> None:
    """Write screenshots/<name>.png."""
    path = PICTURES / f"{name.replace('/', '-')}.png"
    browser.save_screenshot(str(path))
    print(f"[browser] {path.relative_to(ROOT)}", flush=True)


def busy(browser: webdriver.Chrome) -> bool:
    """Whether a cell runs or waits to."""
    prompts = all_of(browser, ".jp-CodeCell .jp-InputPrompt")
    return not prompts or any(re.search(r"\[[\s*]\]", one.text) for one in prompts)


def idle(browser: webdriver.Chrome) -> bool:
    """Whether the kernel waits for something to do."""
    return any(
        "| Idle" in one.text for one in all_of(browser, "#jp-bottom-panel, #jp-main-statusbar")
    )


def run_all(browser: webdriver.Chrome, lab: Lab, name: str) -> float:
    """Open a notebook, run all of its cells; seconds."""
    browser.get(lab.address(f"lab/tree/{COPIES.name}/{name}.ipynb") + "&reset")
    wait(lambda: all_of(browser, ".jp-NotebookPanel .jp-CodeCell"), 90, f"{name} is open")
    wait(lambda: idle(browser), 120, f"{name} has a kernel")
    began = time.monotonic()
    menu(browser, "Run", "Run All Cells")
    time.sleep(1)
    wait(lambda: idle(browser) and not busy(browser), PATIENCE, f"{name} has run")
    check(browser, name)
    return time.monotonic() - began


def menu(browser: webdriver.Chrome, top: str, entry: str) -> None:
    """Click an entry of a menu."""
    named = ".lm-MenuBar-itemLabel"
    wait(lambda: [one for one in all_of(browser, named) if one.text == top], 60, f"menu {top}")[
        0
    ].click()
    wait(
        lambda: [one for one in all_of(browser, ".lm-Menu-itemLabel") if one.text == entry],
        20,
        entry,
    )[0].click()


def show(browser: webdriver.Chrome, selector: str) -> WebElement:
    """Scroll to the first element; it."""
    one = wait(lambda: all_of(browser, selector), 30, selector)[0]
    browser.execute_script("arguments[0].scrollIntoView({block: 'start'})", one)
    time.sleep(0.5)
    return one


def timed(
    browser: webdriver.Chrome,
    name: str,
    act: Callable[[], Any],
    seen: Callable[[], Any],
    limit: float,
) -> float:
    """How long until what an action changes is seen differently."""
    before, began = seen(), time.monotonic()
    act()
    wait(lambda: seen() != before, 60, f"{name} changes what is shown")
    took = time.monotonic() - began
    print(f"[browser] {name}: {took:.2f} s, at most {limit:g}", flush=True)
    check(browser, f"explorer-{name}")
    expect(
        took <= limit,
        f"{name}: took {took:.2f} s, expected at most {limit:g} on a machine that does nothing else",
    )
    return took


def explore(browser: webdriver.Chrome, lab: Lab) -> dict[str, float]:
    """Turn every control of the explorer; seconds by control."""
    times = {"explorer, run all": run_all(browser, lab, "explorer")}
    panel = ".jp-OutputArea-output .widget-vbox"

    def text(selector: str) -> Callable[[], list[str]]:
        return lambda: [
            one.get_attribute("innerHTML") for one in all_of(browser, f"{panel} {selector}")
        ]

    weights, texts = text(".mixdpo-weights"), text(".mixdpo-text")
    show(browser, panel)
    expect(len(texts()) == 4, f"expected the base and three experts, found {len(texts())} texts")
    expect(len(all_of(browser, f"{panel} .mixdpo-token")) > 20, "tokens are not coloured")
    picture(browser, "explorer-1-opened")

    def press(name: str) -> None:
        found = [one for one in all_of(browser, f"{panel} button") if name in one.text]
        browser.execute_script("arguments[0].click()", found[0])

    def slide(place: int, *keys: str) -> None:
        handle = all_of(browser, f"{panel} .noUi-handle")[place]
        handle.send_keys(*keys)

    times["answer a comparison"] = timed(
        browser, "answer", partial(press, "A is better"), weights, 2
    )
    for letter in "BAB":
        timed(browser, f"answer {letter}", partial(press, f"{letter} is better"), weights, 2)
    picture(browser, "explorer-2-answered")
    times["gate temperature"] = timed(
        browser, "temperature", partial(slide, 1, *[Keys.ARROW_RIGHT] * 8), weights, 2
    )
    times["top S"] = timed(browser, "top-S", partial(slide, 2, Keys.ARROW_LEFT), weights, 2)
    picture(browser, "explorer-3-top-s")
    timed(browser, "top-S back", partial(slide, 2, Keys.ARROW_RIGHT), weights, 2)
    times["write again: base and three experts"] = timed(
        browser, "again", partial(press, "write again"), texts, 6
    )
    box = all_of(browser, f"{panel} .widget-combobox input, {panel} .widget-text input")[0]
    typed = [Keys.CONTROL, "a", Keys.NULL, "The last scene was", Keys.ENTER]
    times["typed prompt"] = timed(browser, "prompt", lambda: box.send_keys(*typed), texts, 6)
    expect("The last scene was" in texts()[0], "the typed prompt is not shown")
    timed(browser, "forget", partial(press, "forget"), weights, 2)
    picture(browser, "explorer-4-typed")
    return times


class Quiet(http.server.SimpleHTTPRequestHandler):
    """A server that does not list what it is asked for."""

    def log_message(self, *words: object) -> None:
        """Nothing."""


def pages(browser: webdriver.Chrome) -> None:
    """Three pages of the site, without a network; said where it has not been built."""
    front = sorted(SITE.rglob("index.html"), key=lambda path: len(path.parts))
    if not front:
        print(
            f"[browser] skipped: no pages in {SITE.relative_to(ROOT)}; make book builds them",
            flush=True,
        )
        return
    handler = partial(Quiet, directory=str(front[0].parent))
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    found = [
        path
        for path in sorted(front[0].parent.rglob("*.html"))
        if path.stem not in ("search", "genindex") and "_static" not in path.parts
    ]
    chosen = [
        front[0],
        *[path for path in found if "04_mix_dpo" in path.name or "glossary" in path.name],
    ]
    chosen = list(dict.fromkeys([*chosen, *found]))[:PAGES]
    browser.get("about:blank")
    browser.get_log("browser")  # what JupyterLab's page said when its server went
    for path in chosen:
        name = path.relative_to(front[0].parent).as_posix()
        browser.get(f"http://127.0.0.1:{server.server_address[1]}/{name}")
        time.sleep(2)
        check(browser, f"site-{name}")
        picture(browser, f"site-{name.removesuffix('.html')}")
    server.shutdown()


def main(parts: list[str]) -> None:
    """All parts, or those named; ends with one line, or the first thing that is wrong."""
    expect(set(parts) <= set(PARTS), f"{' '.join(parts)}: expected some of {' '.join(PARTS)}")
    PICTURES.mkdir(exist_ok=True)
    for old in PICTURES.glob("failed*.png"):
        old.unlink()
    shutil.rmtree(COPIES, ignore_errors=True)
    browser, times = open_browser(), {}
    try:
        if set(parts) & {"explorer", "notebooks"}:
            with Lab() as lab:
                if "explorer" in parts:
                    times |= explore(browser, lab)
                for name in NOTEBOOKS if "notebooks" in parts else ():
                    times[name] = run_all(browser, lab, name)
                    show(browser, ".jp-OutputArea-output svg, .jp-OutputArea-output img")
                    picture(browser, name)
        if "site" in parts:
            pages(browser)
    except SystemExit:
        picture(browser, "failed")
        raise
    finally:
        browser.quit()
        shutil.rmtree(COPIES, ignore_errors=True)
    text = json.dumps({name: round(took, 2) for name, took in times.items()}, indent=1)
    (PICTURES / "times.json").write_text(text + "\n")
    print(
        text
        + "\n[browser] no red block, no warning, no error in the console; look at screenshots/",
        flush=True,
    )


if __name__ == "__main__":
    main(sys.argv[1:] or list(PARTS))
