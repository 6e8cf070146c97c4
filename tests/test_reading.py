"""Progress of reading image files: what is counted, and what commands show of it."""

import io
import re

import pytest
from photos import smooth_image, write_photos
from rich.console import Console

from mixmo_fastai.cli import reading
from mixmo_fastai.cli import run as program
from mixmo_fastai.cli.console import Output
from mixmo_fastai.cli.reading import ReadingDisplay, reading_shown
from mixmo_fastai.data.decoding import BATCH, decode_batches, image_sizes, undecodable
from mixmo_fastai.runtime.progress import counted, reported_to

FIT = ["--arch", "wrn10_1", "--epochs", "1", "--batch-size", "4", "--repeat", "2"]
FIT += ["--device", "cpu"]


class TestCounting:
    def test_items_of_batches_are_counted(self):
        reports = []
        with reported_to(lambda *report: reports.append(report)):
            assert [*counted(["abc", "de"], "Reading", 5)] == ["abc", "de"]
        assert reports == [("Reading", 0, 5), ("Reading", 3, 5), ("Reading", 5, 5)]
        assert [*counted(["abc"], "Reading", 3)] == ["abc"]
        assert len(reports) == 3

    @pytest.mark.parametrize(
        ("read", "task"),
        [
            (lambda paths: [*decode_batches(paths, (4, 4))], "Decoding images"),
            (lambda paths: [*image_sizes(paths)], "Reading image sizes"),
            (lambda paths: [*undecodable(paths)], "Checking images"),
        ],
    )
    def test_every_file_is_counted(self, read, task, tmp_path):
        smooth_image(8, 8).save(tmp_path / "a.png")
        total, reports = BATCH + 2, []
        with reported_to(lambda *report: reports.append(report)):
            read([tmp_path / "a.png"] * total)
        assert reports == [(task, done, total) for done in (0, BATCH, total)]


@pytest.fixture
def clock(monkeypatch):
    """Return a function that sets the time."""
    now = [100.0]
    monkeypatch.setattr(reading.time, "perf_counter", lambda: now[0])

    def set_to(seconds):
        now[0] = 100.0 + seconds

    return set_to


def output_to(text, *, is_terminal, **settings):
    output = Output(**settings)
    output.console = Console(file=text, width=90, force_terminal=is_terminal, color_system=None)
    return output


class TestDisplay:
    def test_lines_elsewhere_than_on_a_terminal(self, clock):
        display = ReadingDisplay(output_to(text := io.StringIO(), is_terminal=False))
        for seconds, done in [(0, 0), (9, 90), (11, 110), (20, 200), (70, 700), (72, 720)]:
            clock(seconds)
            display("Decoding images", done, 1000)
        clock(100)
        display("Decoding images", 1000, 1000)
        assert text.getvalue().splitlines() == [
            "Decoding images: 110 of 1,000, 10 images/s, 0:01:29 left",
            "Decoding images: 720 of 1,000, 10 images/s, 0:00:28 left",
            "Decoding images: 1,000 in 0:01:40, 10 images/s",
        ]

    @pytest.mark.parametrize("is_terminal", [False, True])
    def test_short_tasks_print_nothing(self, clock, is_terminal):
        display = ReadingDisplay(output_to(text := io.StringIO(), is_terminal=is_terminal))
        for seconds, done in [(0, 0), (0.9, 500), (8, 1000)]:
            clock(seconds)
            display("Decoding images", done, 1000)
        assert text.getvalue() == ""

    def test_bar_on_a_terminal(self, clock):
        display = ReadingDisplay(output_to(text := io.StringIO(), is_terminal=True))
        for seconds, done in [(0, 0), (2, 400), (4, 800)]:
            clock(seconds)
            display("Decoding images", done, 1000)
        display.bar.refresh()
        shown = text.getvalue().rpartition("\x1b[2K")[2]
        assert re.match(r"Decoding images .* +800/1000 200 images/s, left 0:00:01", shown)
        display("Decoding images", 1000, 1000)
        assert display.bar is None
        assert "1,000 in" not in text.getvalue()  # in less than ten seconds

    @pytest.mark.parametrize("is_terminal", [False, True])
    @pytest.mark.parametrize("reason", ["quiet", "is_silent"])
    def test_nothing_is_shown_if_the_command_is_quiet(self, clock, reason, is_terminal):
        output = output_to(text := io.StringIO(), is_terminal=is_terminal)
        setattr(output, reason, True)
        display = ReadingDisplay(output)
        for seconds, done in [(0, 0), (20, 400), (90, 1000)]:
            clock(seconds)
            display("Decoding images", done, 1000)
        assert text.getvalue() == ""

    def test_the_bar_is_removed_after_an_error(self, clock):
        bars = []

        def stop_at_second(batches):
            for number, batch in enumerate(batches):
                clock(2)
                bars.append(display.bar)
                if number == 1:
                    raise KeyboardInterrupt
                yield batch

        with (
            pytest.raises(KeyboardInterrupt),
            reading_shown(output_to(io.StringIO(), is_terminal=True)) as display,
        ):
            list(stop_at_second(counted(["ab", "cd", "ef"], "Decoding images", 6)))
        assert bars[0] is None
        assert bars[1].finished is False
        assert bars[1].live.is_started is False
        assert display.bar is None


@pytest.mark.slow
@pytest.mark.parametrize("flags", [(), ("--quiet",), ("--json",)], ids=str)
def test_fit_shows_that_it_decodes_images(flags, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("MIXMO_DATA_DIR", str(tmp_path / "home"))
    monkeypatch.setattr(reading, "LINE_AFTER", 0)
    folder = write_photos(tmp_path / "photos", per_class=8)
    arguments = ["fit", str(folder), *FIT, "--set", "data.image_size=16"]
    assert program([*arguments, *flags, "--out", str(tmp_path / "run")]) == 0
    printed = capsys.readouterr()
    line = re.compile(r"^Decoding images: 16 in 0:00:0\d, [\d,]+ images/s$", re.MULTILINE)
    assert bool(line.search(printed.out)) == (not flags)
    assert bool(line.search(printed.err)) == (flags == ("--json",))
    # The images are cached now.
    assert program([*arguments, "--out", str(tmp_path / "again")]) == 0
    assert "Decoding images" not in capsys.readouterr().out
