"""Progress: a bar where somebody looks, lines where nobody does, none that stays behind."""

import io
import json
import os
import pty
import subprocess
import sys
import termios
import threading
import time
from types import SimpleNamespace

import nbformat
import pytest
from nbclient import NotebookClient

from mixdpo_lib import store
from mixdpo_lib.store import reporting


def test_progress_is_rate_limited(capsys, monkeypatch, tmp_path):
    monkeypatch.setenv("MIXDPO_PROGRESS", str(tmp_path / "log"))
    for done in range(1, 101):
        store.progress("a stage of this test", done, 100, "words")
    lines = capsys.readouterr().err.splitlines()
    assert lines == [
        "[mixdpo] a stage of this test 1/100 words",
        "[mixdpo] a stage of this test 100/100 words",
    ]
    assert (tmp_path / "log").read_text().splitlines() == lines


def test_a_stage_that_is_over_at_once_writes_no_line(capsys, monkeypatch):
    monkeypatch.delenv("MIXDPO_PROGRESS", raising=False)
    clock = iter([0.0, 0.4, 0.9, 10.0, 11.5, 12.0, 17.0, 17.1])
    monkeypatch.setattr(reporting.time, "monotonic", lambda: next(clock))
    for done in (1, 2, 3):
        store.progress("a short stage", done, 3)
    for done in (1, 2, 3, 4, 5):
        store.progress("a long stage", done, 5)
    assert capsys.readouterr().err.splitlines() == [
        "[mixdpo] a long stage 2/5",
        "[mixdpo] a long stage 4/5",
        "[mixdpo] a long stage 5/5",
    ]
    assert not {"a short stage", "a long stage"} & set(reporting._stages)


class Screen(io.StringIO):
    def isatty(self):
        return True


@pytest.fixture
def screen(monkeypatch):
    """A terminal that keeps what is written; bars are drawn at every call."""
    monkeypatch.delenv("MIXDPO_PROGRESS", raising=False)
    monkeypatch.setattr(reporting, "REFRESH_S", 0.0)
    system = SimpleNamespace(stderr=Screen(), stdout=sys.stdout, modules=sys.modules)
    monkeypatch.setattr(reporting, "sys", system)  # pytest puts sys.stderr itself back
    yield system.stderr
    assert reporting._bars == {}, "a bar was left behind"


def shown(screen):
    """What stood on the lines of the screen, one after another."""
    return [
        line.strip() for line in screen.getvalue().replace("\n", "\r").split("\r") if line.strip()
    ]


def test_a_terminal_shows_one_bar_with_loss_and_time_left(screen):
    for done in range(1, 5):
        store.progress("fit K=3", done, 4, f"loss {1 / done:.2f}")
    lines = shown(screen)
    assert all(line.startswith("fit K=3 ") and line.endswith(" left]") for line in lines)
    assert [line.split("[")[0].split()[-3:] for line in lines] == [
        ["1/4,", "loss", "1.00"],
        ["2/4,", "loss", "0.50"],
        ["3/4,", "loss", "0.33"],
        ["4/4,", "loss", "0.25"],
    ]
    assert (
        "[mixdpo]" not in screen.getvalue() and screen.getvalue().rsplit("\r", 2)[1].strip() == ""
    )  # gone at the end


def test_a_stage_that_is_done_at_once_shows_nothing(screen):
    store.progress("nothing", 0, 0)
    store.progress("one", 1, 1)
    store.progress("again", 5, 5)
    assert screen.getvalue() == ""


def test_a_text_alone_moves_the_bar(screen):
    store.progress("judges", 0, 2, "first")
    store.progress("judges", 0, 2, "second")
    store.progress("judges", 2, 2)
    assert "0/2, second" in screen.getvalue()


def test_a_stage_that_begins_anew_has_a_new_bar(screen):
    store.progress("fit", 7, 10)
    store.progress("fit", 1, 10)
    assert [(bar.n, bar.initial) for bar in reporting._bars.values()] == [(1, 1)]
    store.progress("fit", 2, 20)  # another total: another fit
    assert [(bar.n, bar.total) for bar in reporting._bars.values()] == [(2, 20)]
    store.progress("fit", 20, 20)


def test_a_stage_that_ends_early_says_so(screen):
    store.progress("fit", 7, 10, "steps")
    store.progress("fit", 8, 8, "no better")
    assert reporting._bars == {} and "8/8, no better" in screen.getvalue()


def test_a_stage_that_is_left_goes_when_the_one_around_it_moves(screen):
    store.progress("outer", 1, 3)
    store.progress("inner", 1, 9)
    assert len(reporting._bars) == 2
    store.progress("outer", 2, 3)
    assert [stage for _, stage in reporting._bars] == ["outer"]
    store.progress("outer", 3, 3)


def test_stages_of_two_threads_do_not_mix(screen):
    in_step, seen = threading.Barrier(2, timeout=60), []

    def work(total):
        for done in range(1, 6):
            store.progress("texts", done, total)
            in_step.wait()
            seen.append(sorted((bar.n, bar.total) for bar in reporting._bars.values()))
            in_step.wait()
        store.progress("texts", total, total)

    threads = [threading.Thread(target=work, args=(total,)) for total in (10, 20)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert seen == [[(done, 10), (done, 20)] for done in range(1, 6) for _ in threads]


def test_a_note_does_not_break_a_bar(screen):
    store.progress("fit", 1, 2)
    store.note("a word")
    store.progress("fit", 2, 2)
    assert "[mixdpo] a word" in shown(screen) and screen.getvalue().count("[mixdpo]") == 1


def test_one_of_several_processes_speaks(screen, monkeypatch):
    monkeypatch.setenv("RANK", "1")
    store.progress("fit", 1, 2)
    assert screen.getvalue() == ""


def test_a_heartbeat_is_a_clock_on_a_terminal(screen):
    with store.heartbeat("converting"):
        time.sleep(0.05)
    assert shown(screen)[0] == "converting [00:00]" and "[mixdpo]" not in screen.getvalue()


def test_a_heartbeat_is_lines_elsewhere(monkeypatch, capsys):
    monkeypatch.setattr(reporting, "HEARTBEAT_S", 0.02)
    with store.heartbeat("converting"):
        time.sleep(0.2)
    assert capsys.readouterr().err.splitlines()[:2] == [
        "[mixdpo] converting",
        "[mixdpo] converting: 0 s",
    ]


@pytest.mark.parametrize("end", ["", "; raise SystemExit(1)", "; raise KeyboardInterrupt"])
def test_a_process_that_ends_takes_its_bars_along(end):
    ours, theirs = pty.openpty()
    termios.tcsetwinsize(theirs, (24, 80))
    code = "from mixdpo_lib import store; store.progress('fit', 1, 3, 'loss 0.5')" + end
    process = subprocess.Popen([sys.executable, "-c", code], stderr=theirs)
    os.close(theirs)
    said = b""
    try:
        while part := os.read(ours, 4096):
            said += part
    except OSError:  # the other side is closed
        pass
    process.wait(20)
    os.close(ours)
    assert b"1/3, loss 0.5" in said and b"[mixdpo]" not in said
    assert (
        said.decode().rstrip("\r\n").rsplit("\r", 1)[1].strip() == ""
    )  # the last that was drawn is nothing


# ------------------------------------------------------------------------------------ in a notebook
def execute(tmp_path, monkeypatch, *cells):
    """Outputs of cells, run in a real kernel, and the state of its widgets."""
    kernel = tmp_path / "kernels" / "here"
    kernel.mkdir(parents=True)
    argv = [sys.executable, "-m", "ipykernel_launcher", "-f", "{connection_file}"]
    (kernel / "kernel.json").write_text(
        json.dumps({"argv": argv, "display_name": "here", "language": "python"})
    )
    monkeypatch.setenv("JUPYTER_PATH", str(tmp_path))
    monkeypatch.setenv("IPYTHONDIR", str(tmp_path / "ipython"))
    book = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(cell) for cell in cells])
    NotebookClient(book, kernel_name="here", allow_errors=True, timeout=180).execute()
    widgets = (
        book.metadata.get("widgets", {})
        .get("application/vnd.jupyter.widget-state+json", {})
        .get("state", {})
    )
    return [cell.outputs for cell in book.cells], [widget["state"] for widget in widgets.values()]


def test_a_notebook_shows_widgets_and_nothing_red(tmp_path, monkeypatch):
    monkeypatch.delenv("MIXDPO_PROGRESS", raising=False)
    outputs, widgets = execute(
        tmp_path,
        monkeypatch,
        "from mixdpo_lib import store\nfrom mixdpo_lib.store import reporting\n"
        "reporting.REFRESH_S = 0",
        "for done in range(1, 5): store.progress('fit', done, 4, 'loss 0.5')",
        "store.progress('texts', 1, 3)\nraise KeyboardInterrupt",
        "store.note('a word')\nprint(len(reporting._bars))\n"
        "with store.heartbeat('converting'): pass",
    )
    streams = [output for cell in outputs for output in cell if output.output_type == "stream"]
    assert {stream.name for stream in streams} == {"stdout"}
    assert "".join(stream.text for stream in streams) == "[mixdpo] a word\n0\n"
    assert "application/vnd.jupyter.widget-view+json" in outputs[1][0].data
    (bar,) = [
        state
        for state in widgets
        if state.get("_model_name") == "FloatProgressModel" and state.get("max") == 3
    ]
    assert bar["bar_style"] == "danger"  # it was interrupted: it says so, and moves no more
    texts = " ".join(
        state.get("value", "") for state in widgets if state.get("_model_name") == "HTMLModel"
    )
    assert "4/4,\u2007loss\u20070.5" in texts and "left]" in texts


def test_a_notebook_without_widgets_shows_text_and_nothing_red(tmp_path, monkeypatch):
    monkeypatch.delenv("MIXDPO_PROGRESS", raising=False)
    outputs, _ = execute(
        tmp_path,
        monkeypatch,
        "import sys; sys.modules['ipywidgets'] = None",
        "from mixdpo_lib import store\nfor done in range(1, 5): store.progress('fit', done, 4)",
    )
    assert {output.name for cell in outputs for output in cell} == {"stdout"}
    assert "1/4" in outputs[1][0].text


def test_in_the_runners_kernel_lines_go_to_the_file_alone(tmp_path, monkeypatch):
    monkeypatch.setenv("MIXDPO_PROGRESS", str(tmp_path / "log"))
    work = "for done in range(1, 5): store.progress('fit', done, 4, 'loss 0.5')"
    cell = f"from mixdpo_lib import store\n{work}"
    assert execute(tmp_path, monkeypatch, cell) == ([[]], [])
    assert (
        tmp_path / "log"
    ).read_text() == "[mixdpo] fit 1/4 loss 0.5\n[mixdpo] fit 4/4 loss 0.5\n"


def test_a_reader_who_left_ends_no_work(monkeypatch):
    class Closed(io.StringIO):
        def write(self, _):
            raise BrokenPipeError

    system = SimpleNamespace(stderr=Closed(), stdout=sys.stdout, modules=sys.modules)
    monkeypatch.delenv("MIXDPO_PROGRESS", raising=False)
    monkeypatch.setattr(reporting, "sys", system)
    store.note("nobody reads this")
