import pytest

from mixmo_fastai.cli.console import wrap_line

LINE = "95 % CI     accuracy 25.44 % to 27.18 %, NLL 1.9251 to 1.9558, ECE 1.91 % to 3.45 %"


@pytest.mark.parametrize("width", range(30, 90))
def test_wrapped_lines_are_aligned_with_the_second_column(width):
    lines = wrap_line(LINE, width)
    assert " ".join([lines[0], *(line.strip() for line in lines[1:])]) == LINE
    assert all(len(line) <= width for line in lines)
    if width >= 36:
        assert all(line.startswith(12 * " ") for line in lines[1:])


@pytest.mark.parametrize("width", range(30, 90))
def test_numbers_are_not_separated_from_their_unit(width):
    assert not [line for line in wrap_line(LINE, width) if line.strip().startswith("%")]


def test_commands_and_paths_are_not_wrapped():
    command = "  mixmo fit " + "--set data.valid_split=0.1 " * 5
    assert wrap_line(command, 40) == [command]
    path = "Curve: " + "folder/" * 20
    assert wrap_line(path, 40) == ["Curve:", "  " + "folder/" * 20]
